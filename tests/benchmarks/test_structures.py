"""What finished weights learn: the tree of masks, its splits, and the scripts on a real layout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from anatomies import ball
from conftest import REPOSITORY
from dataset_trees import write_nifti
from tiny import tiny_model

from foundation.config import Preprocessing
from foundation.data import get_dataset
from foundation.errors import UsageError
from foundation.evaluation import read_records
from foundation.model import UniversalModel
from foundation.text import MINILM
from foundation.tuning import get_task

BENCHMARKS = REPOSITORY / "benchmarks"
CASES = {"s0021": "train", "s0022": "train", "s0023": "val", "s0011": "test", "s0327": "test"}
NEW = ("sacrum", "hip_left")
SPACING_MM, SHAPE = 4.0, (30, 28, 26)


@pytest.fixture(scope="module")
def structures() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    before = set(sys.modules)
    yield import_module("structures")
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TotalSegmentator's version 1: balls as organs, a mask for each; no sacrum in s0022."""
    root = tmp_path_factory.mktemp("totalsegmentator") / "Totalsegmentator_dataset"
    names = (*get_task("organs").labels, *NEW)
    affine = np.diag([SPACING_MM] * 3 + [1.0])
    for number, case in enumerate(CASES):
        rng = np.random.default_rng(number)
        hu = rng.normal(-90, 10, SHAPE)
        hu[0] = -1000
        for place, name in enumerate(names):
            corner = np.array(np.unravel_index(place, (3, 3, 3))) * 8 + 5 + rng.integers(0, 2, 3)
            mask = ball(SHAPE, tuple(corner), 2.5)
            if (case, name) == ("s0022", "sacrum"):
                mask[:] = False
            hu[mask] = 20 + 20 * place
            path = root / case / "segmentations" / f"{name}.nii.gz"
            write_nifti(path, mask.astype(np.uint8), affine)
        write_nifti(root / case / "ct.nii.gz", hu.astype(np.int16), affine)
    rows = [f"{case};50;{split}" for case, split in CASES.items()]
    (root / "meta.csv").write_text("\n".join(["image_id;age;split", *rows]) + "\n")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    grid = Preprocessing(spacing_mm=(SPACING_MM,) * 3, patch_size=(24, 16, 16))
    config = replace(tiny_model().config, text=MINILM, preprocessing=grid)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UniversalModel(config, torch.randn(3, MINILM.dim)).eval()
    return model.save_pretrained(tmp_path_factory.mktemp("weights") / "tiny")


def lab(tree: Path, output: Path, name: str = "15") -> Any:
    return SimpleNamespace(
        generated=False, size="real", output=output, given=SimpleNamespace(data=[f"{name}={tree}"])
    )


def test_scans_that_weights_have_seen_are_left_out_by_name(
    structures: ModuleType, tree: Path, tmp_path: Path
) -> None:
    found = structures.open_structures(lab(tree, tmp_path), ["universal-ct"])
    assert found.left_out == {"s0327"}
    assert found.splits == {"train": ["s0021", "s0022"], "val": ["s0023"], "test": ["s0011"]}
    assert found.note == "Left out, since weights saw them: s0327."
    (tests,) = structures.test_sets(lab(tree, tmp_path), found, NEW)
    assert tests.cases == ("s0011",)


def test_what_is_not_recorded_is_said(
    structures: ModuleType, tree: Path, weights: Path, tmp_path: Path
) -> None:
    found = structures.open_structures(lab(tree, tmp_path), [str(weights)])
    assert not found.left_out and "s0327" in found.splits["test"]
    assert found.note == "What tiny was trained on is not recorded."


def test_another_dataset_is_refused(structures: ModuleType, tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Give TotalSegmentator as 15=DIR"):
        structures.open_structures(lab(tree, tmp_path, "04"), [])


def test_few_scans_show_every_class_and_label_nothing_else(
    structures: ModuleType, tree: Path, tmp_path: Path
) -> None:
    found = structures.open_structures(lab(tree, tmp_path), [])
    assert list(found.showing(NEW, seed=1)) == ["s0021"]
    assert set(found.showing(["hip_left"], seed=1)) == {"s0021", "s0022"}
    for _ in range(2):  # the same call finds its links
        folder = structures.few_scans(found, ["s0021"], ["sacrum"], tmp_path / "few")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.nii.gz"))
    assert files == ["s0021/ct.nii.gz", "s0021/segmentations/sacrum.nii.gz"]
    with pytest.raises(UsageError, match="has no mask of heart"):
        structures.few_scans(found, ["s0021"], ["heart"], tmp_path / "few")


def test_a_structure_is_a_class_of_its_own_beside_what_it_is_a_part_of(
    structures: ModuleType, tree: Path, tmp_path: Path
) -> None:
    found = structures.open_structures(lab(tree, tmp_path), [])
    names = ("sacrum", "lung_upper_lobe_left", "spleen")
    (tests,) = structures.test_sets(lab(tree, tmp_path), found, names)
    dataset = get_dataset(tests.dataset)
    assert dataset.label_map["sacrum"] == ("sacrum",)
    assert dataset.label_map["lung_upper_lobe_left"] == ("lung_left", "lung_upper_lobe_left")
    assert dataset.label_map["spleen"] == ("spleen",)
    (case,) = [case for case in dataset.find(tests.root) if case.id == "s0011"]
    assert {"sacrum", "spleen", "lung_upper_lobe_left"} <= set(case.annotated)
    assert "lung_right" in case.annotated and "aorta" in case.annotated


@pytest.mark.slow
def test_the_world_is_written_as_totalsegmentator_has_it(
    structures: ModuleType, tmp_path: Path
) -> None:
    world = import_module("world")
    made = world.build_world(tmp_path / "world", "smoke", progress=False)
    folder = structures.write_structures(made, tmp_path / "tree")
    splits = structures.read_meta(folder)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [1, 1, 3]
    case = splits["train"][0]
    masks = {path.name.split(".")[0] for path in (folder / case / "segmentations").iterdir()}
    assert masks == set(world.NEW_STRUCTURES)
    labels = np.asanyarray(
        nib.load(made.folder / "structures" / "labels" / f"{case}.nii.gz").dataobj
    )
    heart = np.asanyarray(nib.load(folder / case / "segmentations" / "heart.nii.gz").dataobj) > 0
    dataset = get_dataset(made.dataset("structures")[0])
    (value,) = [int(v) for v, names in dataset.label_map.items() if names == ("heart",)]
    assert heart.any() and np.array_equal(heart, labels == value)
    assert structures.write_structures(made, folder) == folder
    other = replace(made, sha256={**made.sha256, "structures": "0"})
    with pytest.raises(UsageError, match="of another world"):
        structures.write_structures(other, folder)


COMMANDS: dict[str, list[str]] = {
    "table6_transfer": ["--start", "WEIGHTS", "--tasks", "organs", "--shots", "1", "all"],
    "class_from_prompt": ["-m", "WEIGHTS", "--classes", *NEW, "--scans", "1"],
    "continual": ["-m", "WEIGHTS", "--steps-of", "sacrum,hip_left", "--scans", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS)
def test_a_script_runs_on_the_real_layout(
    script: str, tree: Path, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = [str(weights) if word == "WEIGHTS" else word for word in COMMANDS[script]]
    if script == "continual":  # two steps need two scans that show both
        for name in NEW:
            masks = [tree / case / "segmentations" / f"{name}.nii.gz" for case in CASES]
            if not np.any(nib.load(masks[1]).dataobj):
                masks[1].write_bytes(masks[0].read_bytes())
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), f"15={tree}", "-o", str(out)]
    done = subprocess.run(
        [*command, *given, "--max-steps", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_records(out / "records.jsonl")
    assert records and all(record.size == "real" and record.data for record in records)
    assert all("What tiny was trained on is not recorded." in r.note for r in records)
    for record in records:
        start = str(record.arm.get("start", ""))
        is_random = start == "scratch" or start.endswith(" untrained")
        assert len(record.weights) == (0 if is_random else 1), record.arm
