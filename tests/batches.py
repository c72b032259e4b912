"""Scans of which some are broken, and a process that segments them: `python batches.py DATA OUT`.

The network is a threshold on coarse voxels, so that a case takes milliseconds.
"""

import gzip
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from foundation.inference.folder import segment_folder
from foundation.inference.outcomes import exit_code

BROKEN = ("no gzip", "cut", "empty", "text", "nan", "flat")


def write_scan(path: Path, seed: int = 0) -> Path:
    """A bright ball with a core in tissue, in air, 6 mm; each seed has its own."""
    rng = np.random.default_rng(seed)
    shape = (24, 22, 20)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) * 6.0
    distance = np.linalg.norm(grid - rng.uniform(50, 70, 3), axis=-1)
    hu = np.full(shape, -1000.0)
    hu[3:21, 3:19, 2:18] = rng.normal(40, 10, (18, 16, 16))
    hu[distance < rng.uniform(20, 30)] = 300
    hu[distance < rng.uniform(8, 14)] = 600
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(hu.round().astype(np.int16), np.diag([6.0, 6, 6, 1])), path)
    return path


def break_scan(path: Path, how: str) -> None:
    """Make a CT unreadable in one of the ways of `BROKEN`."""
    content = path.read_bytes()
    image = nib.load(path)
    hu = np.asarray(image.dataobj).astype(np.float32)
    if how == "nan":
        hu[5, 5, 5] = np.nan
    elif how == "flat":
        hu[:] = 40
    if how in ("nan", "flat"):
        nib.save(nib.Nifti1Image(hu, image.affine), path)
        return
    plain = gzip.decompress(content)
    path.write_bytes(
        {"no gzip": plain, "cut": content[: len(content) // 2], "empty": b"", "text": b"a CT"}[how]
    )


def write_scans(folder: Path, good: int, broken: int, seed: int = 0) -> list[str]:
    """Write CTs, with the broken ones among them; return the names of the broken."""
    names = [f"case{number:02}" for number in range(good + broken)]
    bad = np.random.default_rng(seed).choice(names, broken, replace=False)
    for number, name in enumerate(names):
        write_scan(folder / f"{name}.nii.gz", seed + number)
    for place, name in enumerate(sorted(bad)):
        break_scan(folder / f"{name}.nii.gz", BROKEN[place % len(BROKEN)])
    return sorted(bad)


def main() -> int:
    """Segment the scans as told by the arguments: DATA OUT [JSON of options]."""
    from thresholds import ThresholdNetwork

    torch.set_num_threads(1)
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    network = ThresholdNetwork(patch=(16, 16, 16), spacing_mm=(6.0, 6.0, 6.0))
    print("ready", flush=True)
    found = segment_folder(network, sys.argv[1], sys.argv[2], progress=False, **options)
    print(json.dumps({each.case: each.status for each in found}), flush=True)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
