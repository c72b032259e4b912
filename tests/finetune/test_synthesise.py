"""Synthetic CTs from label maps: what fine-tuning reads, other bodies by seed, done once."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
from anatomies import ball
from conftest import REPOSITORY
from dataset_trees import write_nifti

from foundation.data.naming import NewClass
from foundation.errors import UsageError
from foundation.taxonomy import NAMES
from foundation.tuning.data import read_data

SHAPE = (40, 36, 44)


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = REPOSITORY / "finetune" / "synthesise.py"
    spec = importlib.util.spec_from_file_location("synthesise", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["synthesise"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("maps")
    labels = np.zeros(SHAPE, np.uint8)
    for value, (centre, radius) in enumerate(
        (((28, 20, 22), 8.0), ((20, 10, 22), 5.0), ((12, 20, 14), 5.0)), start=1
    ):
        labels[ball(SHAPE, centre, radius)] = value
    write_nifti(root / "one/labels.nii.gz", labels, np.diag([4.0, 4.0, 4.0, 1.0]))
    names = {"1": "liver", "2": "vertebrae_L1", "3": "spleen", "4": "gallbladder"}
    (root / "one/labels.json").write_text(json.dumps(names))
    return root


def run(recipe: ModuleType, maps: Path, out: Path, *more: str) -> list[Path]:
    keep = ("--keep", "vertebrae_L1", "liver", "gallbladder")
    recipe.main([str(maps), str(out), "-n", "2", "--size", "40", "--spacing", "5", *keep, *more])
    return sorted(out.iterdir())


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)  # type: ignore[attr-defined]


def test_each_ct_is_another_body_that_fine_tuning_reads(
    recipe: ModuleType, maps: Path, tmp_path: Path
) -> None:
    first, second = run(recipe, maps, tmp_path / "out")
    assert [path.name for path in (first, second)] == ["000_one", "001_one"]
    for folder in (first, second):
        ct, labels = voxels(folder / "ct.nii.gz"), voxels(folder / "labels.nii.gz")
        assert ct.shape == labels.shape == (40, 40, 40)
        assert set(np.unique(labels)) <= {0, 1, 2}  # the spleen is not kept, no gallbladder there
        assert (labels == 2).any()
        bone, soft = ct[labels == 2].mean(), ct[labels == 1].mean()
        assert bone > soft + 50  # rendered as what they are
        assert ct.min() < -900
    assert (voxels(first / "labels.nii.gz") != voxels(second / "labels.nii.gz")).any()
    data = read_data(
        tmp_path / "out", classes=[NewClass("vertebra L1")], work=tmp_path / "work",
        spacing_mm=5.0, old_classes=NAMES, workers=1, progress=False,
    )  # fmt: skip
    # What the map labels and this view lacks is absent, not unknown; the spleen is unknown.
    assert set(data.train[0].annotated) == {"vertebra L1", "liver", "gallbladder"}


def test_a_seed_gives_the_same_and_what_is_there_is_kept(
    recipe: ModuleType, maps: Path, tmp_path: Path
) -> None:
    (first, _) = run(recipe, maps, tmp_path / "a")
    (same, _) = run(recipe, maps, tmp_path / "b")
    (other, _) = run(recipe, maps, tmp_path / "c", "--seed", "1")
    np.testing.assert_array_equal(voxels(first / "ct.nii.gz"), voxels(same / "ct.nii.gz"))
    assert (voxels(first / "ct.nii.gz") != voxels(other / "ct.nii.gz")).any()
    before = (first / "ct.nii.gz").stat().st_mtime_ns
    run(recipe, maps, tmp_path / "a")
    assert (first / "ct.nii.gz").stat().st_mtime_ns == before


def test_wrong_requests(recipe: ModuleType, maps: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No map labels hip; their labels are"):
        recipe.main([str(maps), str(tmp_path / "out"), "--keep", "hip"])
    with pytest.raises(UsageError, match="has no map two; it has one"):
        recipe.main([str(maps), str(tmp_path / "out"), "--cases", "two"])


@pytest.mark.slow
def test_smoke(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["--smoke"])
    assert capsys.readouterr().out.split() == ["000_phantom_0", "001_phantom_0"]
