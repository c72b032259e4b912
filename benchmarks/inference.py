"""Time and peak memory of segmenting one large CT, start to finish, in a process of its own.

    python benchmarks/inference.py [-m MODEL] [--size X Y Z] [--spacing MM MM MM] [--json FILE]
        [--record FILE]

The CT is a generated phantom brought to the asked grid. Prints seconds for loading the model,
segmenting, and saving; peak resident memory of the process; and the size of the CT as float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from foundation import from_pretrained
from foundation.evaluation import (
    Figure,
    add_record_option,
    append_record,
    new_record,
    weights_sha256,
)
from foundation.synthesis import generate, render_ct


def large_ct(size: list[int], spacing_mm: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Generate a phantom's CT (int16 HU) on a grid of `size` voxels, and its affine."""
    body = generate(0, 4.0)
    hu = render_ct(body.label_map, body.names, 4.0, np.random.default_rng(0))
    step = np.asarray(spacing_mm) / 4.0
    offset = (np.asarray(hu.shape) - np.asarray(size) * step) / 2
    grid = ndimage.affine_transform(
        hu, step, offset, output_shape=tuple(size), order=1, cval=-1000.0, output=np.int16
    )
    return grid, np.diag([*spacing_mm, 1.0])


def main() -> None:
    """Run once and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", default="universal-ct")
    parser.add_argument("--size", type=int, nargs=3, default=[512, 512, 400])
    parser.add_argument("--spacing", type=float, nargs=3, default=[0.8, 0.8, 1.0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    add_record_option(parser)
    given = parser.parse_args()
    began = time.perf_counter()

    ct = large_ct(given.size, given.spacing)
    seconds = {}
    start = time.perf_counter()
    model = from_pretrained(given.model, device=given.device)
    seconds["load"] = time.perf_counter() - start
    start = time.perf_counter()
    result = model.segment(ct, device=given.device)
    volumes = result.volumes_ml  # brings every class to the CT's grid
    seconds["segment"] = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result.save(folder)
        seconds["save"] = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # kiB on Linux
    report = {
        "model": given.model,
        "size": given.size,
        "spacing_mm": given.spacing,
        "classes_found": sum(volume > 0 for volume in volumes.values()),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_gib": round(peak, 2),
        "ct_as_float32_gib": round(float(np.prod(given.size)) * 4 / (1 << 30), 2),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    print(json.dumps(report, indent=2), file=sys.stderr)
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if given.record:
        sides, steps = ["×".join(f"{v:g}" for v in each) for each in (given.size, given.spacing)]
        record = new_record(
            "inference",
            "real",
            arm={"model": given.model, "ct": f"{sides} voxels of {steps} mm"},
            figures=[
                *(Figure(name, value, "s", n=1) for name, value in seconds.items()),
                Figure("peak_memory", peak, "GiB", n=1),
                Figure("ct", float(np.prod(given.size)) * 4 / (1 << 30), "GiB"),
            ],
            seconds=time.perf_counter() - began,
            weights=weights_sha256(model),
        )
        append_record(given.record, record)


if __name__ == "__main__":
    main()
