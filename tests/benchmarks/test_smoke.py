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


def run(script: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), "--smoke", "-o", str(folder), *more],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_smoke(script: Path, output: Path) -> None:
    assert f"python benchmarks/{script.name} --smoke" in script.read_text(encoding="utf-8")
    done = run(script, output / script.stem)
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_records(output / script.stem / "records.jsonl")
    assert records and all(record.size == "smoke" for record in records)
    assert all(record.benchmark == script.stem and record.figures for record in records)


@pytest.mark.slow
def test_finished_runs_are_kept_and_smoke_numbers_never_published(output: Path) -> None:
    script = next(path for path in SCRIPTS if path.stem == "table1_prompts")
    assert run(script, output / script.stem).returncode == 0
    records = (output / script.stem / "records.jsonl").read_bytes()
    again = run(script, output / script.stem, "--publish")
    assert again.returncode != 0 and "not published" in again.stderr
    assert (output / script.stem / "records.jsonl").read_bytes() == records
    other = run(script, output / script.stem, "--max-steps", "1")
    assert other.returncode != 0 and "differs in --max-steps" in other.stderr
