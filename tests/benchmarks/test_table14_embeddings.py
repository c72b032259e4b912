"""Table 14 and figure 6 by their real commands, on a tree as BTCV is distributed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from dataset_trees import make_affine, make_ct, make_labels, write_nifti

from foundation.evaluation import read_records
from foundation.pretraining import read_folds

SHAPE = (48, 44, 32)
SMALL = [
    "model.backbone=lite_unet",
    "model.backbone_options={widths: [8, 16], full: 16}",
    "stages.0.patch_size=16",
    "workers=0",
]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / f"{script}.py"), *arguments],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_the_real_commands_run_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    for i in range(10):
        affine = make_affine(i, "LAS")
        write_nifti(tmp_path / f"BTCV/img/img{i + 1:04d}.nii.gz", make_ct(i, SHAPE), affine)
        labels = make_labels(i, range(1, 14), SHAPE)
        write_nifti(tmp_path / f"BTCV/label/label{i + 1:04d}.nii.gz", labels, affine)
    out, figure = tmp_path / "table14", tmp_path / "figure6"
    changes = [text for each in SMALL for text in ("--set", each)]
    real = [f"01={tmp_path / 'BTCV'}", "--max-steps", "2", "--skip-missing"]
    run("table14_embeddings", *real, "-o", str(out), *changes)
    records = read_records(out / "records.jsonl")
    assert [record.arm["text"] for record in records[:2]] == ["one-hot", "MiniLM"]
    assert all(r.size == "real" and r.figure("dice/mean").n == 2 for r in records[:2])
    # What is measured is what no training has seen.
    held_out = read_folds(out / "folds.json").cases(0)
    for folder in ("one-hot-1", "MiniLM-1"):
        folds = read_folds(out / "runs" / folder / "training" / "folds.json")
        assert folds.cases(0) == held_out and len(held_out) == 2

    trained = ["--store", str(out / "store"), "--trained", str(out), "--text", "MiniLM"]
    run("figure6_features", *real, *trained, "-o", str(figure))
    records = read_records(figure / "records.jsonl")
    assert [record.arm["text"] for record in records] == ["one-hot", "MiniLM"]
    assert all(len(record.weights) == 1 and record.figure("kNN/full").n == 2 for record in records)
    assert (figure / "tsne.png").is_file() and not (figure / "runs/one-hot-1/training").exists()
