"""Every script of the paper's tables runs in its smoke size, by the command that its text gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from foundation.evaluation import read_records

SCRIPTS = sorted(
    path for path in (REPOSITORY / "benchmarks").glob("*.py") if "Lab.parse(" in path.read_text()
)
SCRIPTS = [path for path in SCRIPTS if path.stem != "lab"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all, so that the world is generated once."""
    return tmp_path_factory.mktemp("benchmarks")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_smoke(script: Path, output: Path) -> None:
    assert f"python benchmarks/{script.name} --smoke" in script.read_text(encoding="utf-8")
    folder = output / script.stem
    done = subprocess.run(
        [sys.executable, str(script), "--smoke", "-o", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_records(folder / "records.jsonl")
    assert records and all(record.size == "smoke" for record in records)
    assert all(record.benchmark == script.stem and record.figures for record in records)
    again = subprocess.run(
        [sys.executable, str(script), "--smoke", "-o", str(folder), "--publish"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert again.returncode != 0 and "smoke" in again.stderr, "smoke numbers are not published"
    assert len(read_records(folder / "records.jsonl")) == len(records), "finished runs are kept"
