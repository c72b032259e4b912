"""How fast `head` reaches its plateau, what it gets of `full`'s gain, and how small `lora` is.

    python benchmarks/tuning.py SCANS --test TEST -o OUT [--scans 5] [--full-steps 150]
        [-m universal-ct] [--classes "vertebra L1" "left hip" …] [--record FILE]

SCANS and TEST hold a folder per case, as `universal-ct add-class` reads them (`finetune/
synthesise.py` makes such scans). The training scans are first written anew at 512×512×200 voxels.
Then `head` and `full` learn the same classes from the same scans and are measured on the same test
scans. The plateau is the first validation within 0.01 of the best one; its time counts from the
loading of the model, reading and preparing of the scans and features included. Last, an adapter of
`lora` is saved and loaded: its size in percent of the model's, and the seconds to load it. Run it
alone on the machine, with an empty OUT. Targets: 90 s, 90 %, 2 %, 0.2 s.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from foundation import from_pretrained, keep_freed_memory, save_pretrained
from foundation.evaluation import (
    Figure,
    add_record_option,
    append_record,
    new_record,
    path_sha256,
    weights_sha256,
)
from foundation.tuning import AFTER, BEFORE, TuningRun, get_method

CLASSES = ("vertebra L1", "vertebra L2", "vertebra L3", "left hip", "right hip")
SHAPE = (512, 512, 200)
NEAR = 0.01  # of the best validation Dice


def enlarge(source: Path, folder: Path) -> None:
    """Write a case anew with SHAPE voxels over the same millimetres."""
    folder.mkdir(parents=True)
    for name, order in (("ct.nii.gz", 1), ("labels.nii.gz", 0)):
        image = nib.load(source / name)
        array = np.asanyarray(image.dataobj)
        factors = np.array(SHAPE) / array.shape
        enlarged = ndimage.zoom(array, factors, order=order, grid_mode=True, mode="nearest")
        affine = image.affine.copy()
        affine[:3, :3] /= factors  # its columns are the steps of the axes
        affine[:3, 3] = (image.affine @ [*((1 / factors - 1) / 2), 1])[:3]
        nib.save(nib.Nifti1Image(enlarged.astype(array.dtype), affine), folder / name)
    shutil.copy(source / "labels.json", folder / "labels.json")


class Watch(threading.Thread):
    """Notes when each line of a growing table is first seen."""

    def __init__(self, table: Path) -> None:
        super().__init__(daemon=True)
        self.table, self.start_time, self.seen = table, time.perf_counter(), [0.0]
        self.done = threading.Event()

    def run(self) -> None:
        """Look ten times a second."""
        while not self.done.wait(0.1):
            if self.table.is_file():
                lines = self.table.read_text(encoding="utf-8").count("\n")
                missing = lines - len(self.seen)
                self.seen += [time.perf_counter() - self.start_time] * missing


def tune(method: str, args: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """Tune by one method, and return times, and Dice of the new classes on the test scans."""
    folder = args.output / method
    watch = Watch(folder / "tuning" / "validation.csv")
    watch.start()
    run = TuningRun(from_pretrained(args.model), get_method(method, **settings), folder)
    run.read(args.output / "scans", args.classes, test=args.test)
    start = time.perf_counter()
    before = run.measure(BEFORE)
    measuring = time.perf_counter() - start
    run.train()
    after = run.measure(AFTER)
    total = time.perf_counter() - watch.start_time
    watch.done.set()
    with watch.table.open(newline="", encoding="utf-8") as file:
        rows = [(int(row["step"]), float(row["mean"])) for row in csv.DictReader(file)]
    best = max(mean for _, mean in rows)
    place = next(i for i, (_, mean) in enumerate(rows) if mean >= best - NEAR)
    new, old = run.learnt, run.old
    return {
        "plateau_step": rows[place][0],
        "plateau_s": round(watch.seen[place + 1] - measuring, 1),
        "measured_before_in_s": round(measuring, 1),
        "steps": rows[-1][0],
        "total_s": round(total, 1),
        "dice_before": round(before.mean(new) or 0.0, 4),
        "dice": round(after.mean(new) or 0.0, 4),
        "old_before": round(before.mean(old) or 0.0, 4),
        "old": round(after.mean(old) or 0.0, 4),
    }


def adapter(args: argparse.Namespace, rounds: int = 9) -> dict[str, float]:
    """Measure the size of an adapter with the classes, and the median time to load it."""
    method = get_method("lora")
    run = TuningRun(from_pretrained(args.model), method, args.output / "lora")
    run.read(args.output / "scans", args.classes)  # gives the model the classes
    run.model.add_adapter("benchmark", rank=method.rank)
    folder = run.model.save_adapter(args.output / "adapter")
    whole = save_pretrained(run.base, args.output / "base", dtype=torch.float16)
    seconds = []
    for _ in range(rounds):
        model = from_pretrained(args.model)
        start = time.perf_counter()
        model.load_adapter(folder)
        seconds.append(time.perf_counter() - start)
    sizes = [_weights(path).stat().st_size for path in (folder, whole)]
    return {
        "kB": round(sizes[0] / 1000),
        "percent_of_model": round(100 * sizes[0] / sizes[1], 2),
        "first_load_s": round(seconds[0], 3),
        "load_s": round(float(np.median(seconds[1:])), 3),
    }


def _weights(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", type=Path, metavar="SCANS")
    add("--test", type=Path, required=True)
    add("-o", "--output", type=Path, required=True)
    add("-m", "--model", default="universal-ct")
    add("--classes", nargs="+", default=list(CLASSES))
    add("--scans", type=int, default=5)
    add("--full-steps", type=int, default=150)
    add_record_option(parser)
    args = parser.parse_args()
    began = time.perf_counter()
    if not (args.output / "scans").exists():
        cases = sorted(path for path in args.source.iterdir() if path.is_dir())[: args.scans]
        for case in cases:
            enlarge(case, args.output / "scans" / case.name)
    keep_freed_memory()
    head = tune("head", args)
    print(json.dumps({"head": head}), flush=True)
    full = tune("full", args, steps=args.full_steps)
    gains = [each["dice"] - each["dice_before"] for each in (head, full)]
    report = {
        "head": head,
        "full": full,
        "share_of_gain": round(gains[0] / gains[1], 3) if gains[1] > 0 else None,
        "adapter": adapter(args),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=2))
    if args.record:
        lora = report["adapter"]
        record = new_record(
            "tuning",
            "real",
            arm={
                "weights": Path(args.model).name,
                "head_steps": head["steps"],
                "full_steps": full["steps"],
                "scans": "×".join(map(str, SHAPE)) + " voxels",
            },
            figures=[
                Figure("head/plateau", head["plateau_s"], "s", n=1),
                Figure("head/plateau step", head["plateau_step"]),
                Figure("dice/head", head["dice"]),
                Figure("full/seconds", full["total_s"], "s", n=1),
                Figure("dice/full", full["dice"]),
                Figure("dice/before", head["dice_before"]),
                Figure("gain share", report["share_of_gain"]),
                Figure("adapter/size", lora["kB"], "kB"),
                Figure("adapter/share", lora["percent_of_model"] / 100),
                Figure("adapter/load", lora["load_s"], "s"),
                Figure("test before", head["measured_before_in_s"], "s", n=1),
            ],
            seconds=time.perf_counter() - began,
            data={"scans": path_sha256(args.source), "test": path_sha256(args.test)},
            weights=weights_sha256(from_pretrained(args.model)),
        )
        append_record(args.record, record)


if __name__ == "__main__":
    main()
