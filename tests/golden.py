"""What the code computes, as hashes and numbers, to hold two versions of it side by side.

    python tests/golden.py write golden.json            # before a change
    python tests/golden.py check golden.json [PART …]   # after it: which values differ

The parts are `patches` (three samples of each training source), `pretraining` (five steps, and a
run that is killed and resumed), `methods` (five steps of each fine-tuning method) and `masks` (the
embedded model on two phantoms). All take a minute or two. Bits differ between processors: compare
on one machine, never in continuous integration.
"""

import csv
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anatomies import harmonised, paired_organs, write_anatomies
from safetensors.torch import load_file
from tiny_runs import go
from tiny_store import tiny_config, write_store

from foundation import METHODS, finetune, from_pretrained
from foundation.pretraining import load_config
from foundation.pretraining.sources import build_sources, open_store
from foundation.synthesis import SMOKE_CLASS, phantom_ct, write_scans
from foundation.taxonomy import NAMES
from foundation.training import Mixture, PatchGrid

THREADS = 2  # sums differ with their number
WINDOWS = ((-175.0, 250.0), (-1000.0, 1000.0))
CROPS = {"background": 1, "foreground": 2}
VARIED = {"zoom_probability": 1.0, "zoom": [0.8, 1.2], "rotate_probability": 1.0}
SCANS: dict[str, Any] = {"kind": "scans", "crops": CROPS}
SOURCES: dict[str, list[dict[str, Any]]] = {
    "phantoms": [{"kind": "phantoms", "count": 2}],
    "scans": [SCANS],
    "scans augmented": [{**SCANS, "augmentation": {**VARIED, "shift_probability": 1.0}}],
    "synthesis of maps": [{"kind": "synthesis"}],
    "synthesis of scans": [{"kind": "synthesis"}],
}


def digest(value: Any) -> str:
    """A short hash of an array, a tensor, or a mapping of them by name."""
    found = hashlib.sha256()
    if isinstance(value, dict):
        for key in sorted(value):
            found.update(f"{key}{digest(value[key])}".encode())
        return found.hexdigest()[:16]
    array = np.ascontiguousarray(value.detach().cpu() if torch.is_tensor(value) else value)
    found.update(str(array.dtype).encode())
    found.update(str(array.shape).encode())
    found.update(array.tobytes())
    return found.hexdigest()[:16]


def column(path: Path, name: str) -> list[str]:
    """A column of a CSV file."""
    with path.open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def patches(work: Path) -> dict[str, Any]:
    """Samples of each source."""
    pair = paired_organs().label_map
    organs = ("kidney_left", "kidney_right", "liver")
    stores = {}
    for name, hu in (("maps", None), ("scans", np.where(pair > 1, 200, -100))):
        stores[f"synthesis of {name}"] = work / name
        (work / name).mkdir()
        write_anatomies(work / name, {"pair": harmonised(pair, ("fat", *organs), organs, ct=hu)})
    common = write_store(work / "store")
    found = {}
    grid = PatchGrid((48, 48, 48), 4.0, WINDOWS, 2000, NAMES)
    for kind, sources in SOURCES.items():
        config = load_config(tiny_config(stores.get(kind, common), sources=sources), ())
        mixture = Mixture(build_sources(config, open_store(config), frozenset()), 7)
        for number in range(3):
            sample: Any = mixture.sample(number, grid)
            for key in ("image", "voxels", "target", "annotated", "weight"):
                found[f"patch {kind} {number} {key}"] = digest(sample[key])
    return found


def pretraining(work: Path) -> dict[str, Any]:
    """Five steps; and a longer run that is killed and goes on."""
    store = write_store(work / "store")
    coarse = {"steps": 2, "patch_size": 16, "spacing_mm": 8, "batch_size": 2}
    fine = {"steps": 3, "patch_size": 16, "spacing_mm": 4, "batch_size": 2}
    go(tiny_config(store, stages=[coarse, fine]), work / "five")
    long = tiny_config(store, stages=[{**fine, "steps": 60}])
    run = work / "resumed"
    code = f"from tiny_runs import go; from pathlib import Path; go({long!r}, Path({str(run)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    while not (run / "last").is_dir() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "model").is_dir(), "the run ended before it could be killed"
    go(long, run)
    losses = np.array([float(value) for value in column(run / "log.csv", "loss")])
    return {
        "pretraining weights": digest(load_file(work / "five/model/model.safetensors")),
        "pretraining losses": column(work / "five/log.csv", "loss"),
        "resumed weights": digest(load_file(run / "model/model.safetensors")),
        "resumed losses": digest(losses),
    }


def methods(work: Path) -> dict[str, Any]:
    """A few steps of each way of fine-tuning."""
    scans = write_scans(work / "scans", 3)
    found: dict[str, Any] = {}
    for method in METHODS:
        options: dict[str, Any] = {"steps": 5, "validate_every": 5, "windows": 4, "voxels": 4096}
        if method != "head":
            options["probe"] = 2
        tuned = finetune(
            "universal-ct",
            scans,
            [SMOKE_CLASS],
            output=work / method,
            method=method,
            device="cpu",
            progress=False,
            **options,
        )
        state = tuned.model.state_dict()
        found[f"{method} weights"] = digest(state)
        found[f"{method} validation"] = column(work / method / "tuning/validation.csv", "mean")
        for when, scores in (("before", tuned.before), ("after", tuned.after)):
            found[f"{method} dice {when}"] = round(scores.mean([SMOKE_CLASS]) or 0, 6)
    return found


def masks(work: Path) -> dict[str, Any]:
    """Masks and volumes of the embedded model."""
    model = from_pretrained("universal-ct")
    found = {}
    for seed in (1, 2):
        result = model.segment(phantom_ct(work / f"{seed}.nii.gz", seed), progress=False)
        for name in result.classes:
            volume_ml = round(float(result.volumes_ml[name]), 4)
            found[f"phantom {seed} {name}"] = [digest(result.mask(name)), volume_ml]
    return found


def main() -> int:
    """Write or check; the exit code is 1 if a value differs."""
    torch.set_num_threads(THREADS)
    verb, path = sys.argv[1], Path(sys.argv[2])
    parts = {each.__name__: each for each in (patches, pretraining, methods, masks)}
    found: dict[str, Any] = {}
    for part in sys.argv[3:] or parts:
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            found |= parts[part](Path(folder))
            print(f"{part}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    if verb == "write":
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    stored = json.loads(path.read_text(encoding="utf-8"))
    different = [key for key in found if stored.get(key) != found[key]]
    for key in different:
        print(f"differs: {key}: {stored.get(key)} before, {found[key]} now")
    print(f"{len(found) - len(different)} equal, {len(different)} differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
