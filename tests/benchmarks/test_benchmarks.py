"""Benchmarks run on the shipped configurations, whatever these become. Speeds are not asserted."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "foundation"
SMALL = ["--steps", "1", "--rounds", "1", "precision=float32"]


def report(script: str, *arguments: str) -> dict[str, object]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    printed: dict[str, object] = json.loads(finished.stdout)
    return printed


TEXTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in sorted((REPOSITORY / "benchmarks").glob("*.py"))
}
SCRIPTS = list(TEXTS)
IMPORTED = [name for name, text in TEXTS.items() if 'if __name__ == "__main__"' not in text]
# The scripts of the paper's tables are run whole, by test_smoke.
CALLED = [n for n, text in TEXTS.items() if n not in IMPORTED and "Lab.parse(" not in text]


@pytest.mark.slow
@pytest.mark.parametrize("script", CALLED)
def test_a_script_says_how_it_is_called(script: str) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script), "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"usage: {script}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_public_names_only(script: str) -> None:
    tree = ast.parse(TEXTS[script])
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {module for module in modules if module.split(".")[0] == "foundation"}
    rooms = {f"foundation.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    assert ours or script in IMPORTED, "the test sees what a script imports"
    assert ours <= {"foundation", *rooms}


@pytest.mark.slow
def test_the_training_step_is_measured_beside_plain_monai() -> None:
    measured = report("step.py", "--patch", "64", "--batch", "1", *SMALL)
    assert measured["samples_per_second"]


@pytest.mark.slow
def test_throughput_is_measured_without_the_weights_that_a_pass_starts_from() -> None:
    changes = ["sources=[{kind: phantoms, count: 1}]", "validation.hold_out=[]", "echo=1"]
    changes += ["stages=[{steps: 1, patch_size: 64, spacing_mm: 6}]", "workers=0"]
    measured = report("throughput.py", "universal-ct-longer", "--warm-up", "1", *SMALL, *changes)
    assert measured["percent_of_compute"]
