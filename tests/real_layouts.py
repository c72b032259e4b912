"""Runs a script of the paper's tables by its real command on tiny trees in the real layouts."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

from foundation.evaluation import Record, read_records

# In place of the paper's network and patches, with which a test would take hours.
SMALL = (
    "model.backbone=lite_unet",
    "model.backbone_options={widths: [8, 16], full: 16}",
    "model.text=one-hot",
    "stages=[{steps: 2, patch_size: 16, spacing_mm: 1.5, batch_size: 2}]",
    "workers=0",
)


def run_real(script: str, output: Path, *arguments: str, expect: int = 0) -> str:
    """Run it with `--max-steps 2`; returns what it wrote to standard error."""
    settings = [word for text in SMALL for word in ("--set", text)]
    path = str(REPOSITORY / "benchmarks" / script)
    done = subprocess.run(
        [sys.executable, path, *arguments, "-o", str(output), "--max-steps", "2", *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stderr


def records(output: Path) -> list[Record]:
    """What it recorded."""
    return read_records(output / "records.jsonl")
