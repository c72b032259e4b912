"""Random crops: from the store, against decompressing the NIfTI each time; and memory by scans.

    python benchmarks/store.py [--size X Y Z] [--crops N] [--nifti-reads N] [--json FILE]
        [--record FILE]

A generated phantom brought to the asked grid, with noise, is written both as ct.nii.gz and
labels.nii.gz and as a case of a store: the same voxels in both. Prints seconds a crop of either way
(files in the system's cache, one thread), the ratio, the size on disk, and the peak resident memory
of a process that reads random crops of stores of few and of many scans.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
from scipy import ndimage

from foundation.data import Harmonised, ManifestWriter, Store, write_case
from foundation.evaluation import Figure, add_record_option, append_record, new_record
from foundation.synthesis import generate, render_ct

COARSE_MM = 4.0
NOISE_HU = 12.0  # of a single voxel; what is smooth compresses too well
_READ = """
import sys, numpy as np
from foundation.data import Store
store, size, crops = Store(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng, keys = np.random.default_rng(0), store.keys()
for number in range(crops):
    case = store.case(keys[number % len(keys)])
    start = [int(rng.integers(max(1, full - size + 1))) for full in case.shape]
    case.read(start, (size,) * 3)
    case.centres["liver"]
# Linux's own mark of this program: getrusage also counts the process that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def large_phantom(size: list[int]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Stretch a phantom to `size` voxels: int16 HU, uint8 labels, and what the labels are."""
    body = generate(0, COARSE_MM)
    rng = np.random.default_rng(0)
    hu = render_ct(body.label_map, body.names, COARSE_MM, rng)
    factors = np.asarray(size) / hu.shape
    smooth = ndimage.zoom(hu, factors, order=1, output=np.float32, grid_mode=True, mode="nearest")
    labels = ndimage.zoom(body.label_map, factors, order=0, grid_mode=True, mode="nearest")
    smooth += rng.normal(0, NOISE_HU, smooth.shape).astype(np.float32)
    return np.rint(smooth.clip(-1024, 3071)).astype(np.int16), labels, body.names


def write_both(folder: Path, size: list[int]) -> tuple[Path, Path]:
    """The same phantom as NIfTI files and as a store of one case; returns their folders."""
    hu, labels, names = large_phantom(size)
    nifti, store = folder / "nifti", folder / "store"
    nifti.mkdir()
    nib.save(nib.Nifti1Image(hu, np.eye(4)), nifti / "ct.nii.gz")
    nib.save(nib.Nifti1Image(labels, np.eye(4)), nifti / "labels.nii.gz")
    tissues = tuple(names[value] for value in range(len(names)))
    sets = tuple(("liver",) if name == "liver" else () for name in tissues)
    case = Harmonised(hu, labels, np.eye(4), 1.0, sets, tissues, (), ("liver",))
    about = {"dataset": "phantom", "id": "0", "sources": [], "licence": None, "weight": 1.0}
    target = store / "cases" / "phantom" / "0"
    target.mkdir(parents=True)
    description = write_case(target, case, {**about, "split": None})
    writer = ManifestWriter(store, 1.0, {})
    writer.record("phantom/0", description, "")
    writer.save()
    return nifti, store


def of_many(store: Path, scans: int, target: Path) -> Path:
    """A store of `scans` scans, which share the files of one."""
    first = json.loads((store / "manifest.json").read_text(encoding="utf-8"))
    del first["sha256"]  # of a manifest of one case
    entry = first["cases"]["phantom/0"]
    first["cases"] = {}
    for number in range(scans):
        folder = f"cases/phantom/{number}"
        (target / folder).mkdir(parents=True)
        for file in (store / entry["folder"]).iterdir():
            os.link(file, target / folder / file.name)
        first["cases"][f"phantom/{number}"] = {**entry, "folder": folder}
    (target / "manifest.json").write_text(json.dumps(first), encoding="utf-8")
    return target


def median_seconds(read: Callable[[np.random.Generator], object], times: int) -> float:
    """Return the median seconds of `read`, after one call that is not counted."""
    rng = np.random.default_rng(1)
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        read(rng)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def compare(nifti: Path, path: Path, crop: int, crops: int, reads: int) -> dict[str, float]:
    """Measure seconds a crop by either way."""
    store = Store(path)
    shape = store.case("phantom/0").shape

    def start_of(rng: np.random.Generator) -> list[int]:
        return [int(rng.integers(max(1, full - crop + 1))) for full in shape]

    def from_store(rng: np.random.Generator) -> object:
        return store.case("phantom/0").read(start_of(rng), (crop,) * 3)

    def from_nifti(rng: np.random.Generator) -> object:
        box = tuple(slice(first, first + crop) for first in start_of(rng))
        files = (nib.load(nifti / f"{name}.nii.gz") for name in ("ct", "labels"))
        return [np.asanyarray(file.dataobj)[box].copy() for file in files]

    return {
        "store": median_seconds(from_store, crops),
        "nifti": median_seconds(from_nifti, reads),
    }


def main() -> None:
    """Run once and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, nargs=3, default=[512, 512, 300])
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--crops", type=int, default=100, help="crops read from the store")
    parser.add_argument("--nifti-reads", type=int, default=5)
    parser.add_argument("--scans", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--json", type=Path)
    add_record_option(parser)
    given = parser.parse_args()
    began = time.perf_counter()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nifti, store = write_both(folder, given.size)
        seconds = compare(nifti, store, given.crop, given.crops, given.nifti_reads)
        memory = {}
        for scans in given.scans:
            many = of_many(store, scans, folder / f"store{scans}")
            reads = [str(many), str(given.crop), str(2 * max(given.scans))]
            done = subprocess.run(
                [sys.executable, "-c", _READ, *reads], capture_output=True, text=True, check=True
            )
            memory[str(scans)] = round(int(done.stdout) / 1024, 1)  # from kiB
        mib = {
            where.name: round(sum(f.stat().st_size for f in where.rglob("*.*")) / (1 << 20), 1)
            for where in (nifti, store / "cases" / "phantom" / "0")
        }
    report = {
        "size": given.size,
        "crop": given.crop,
        "seconds_per_crop": {name: round(value, 5) for name, value in seconds.items()},
        "times_as_fast": round(seconds["nifti"] / seconds["store"], 1),
        "mib_on_disk": {"nifti": mib["nifti"], "store": mib["0"]},
        "peak_memory_mib_by_scans": memory,
        "blosc2": blosc2.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(report, indent=2))
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if given.record:
        sides = "×".join(map(str, given.size))
        record = new_record(
            "store",
            "real",
            arm={"ct": f"{sides} voxels", "crop": f"{given.crop}³ voxels"},
            figures=[
                Figure("crop/store", seconds["store"], "s", n=given.crops),
                Figure("crop/nifti", seconds["nifti"], "s", n=given.nifti_reads),
                Figure("crop/factor", seconds["nifti"] / seconds["store"], "times"),
                *(Figure(f"memory/{scans}", peak, "MiB") for scans, peak in memory.items()),
            ],
            seconds=time.perf_counter() - began,
        )
        append_record(given.record, record)


if __name__ == "__main__":
    main()
