"""A network on the scans of a dataset: read by its YAML, compared on each scan's own grid."""

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from foundation.config import ClassSpec, NetworkConfig, Preprocessing
from foundation.data import get_dataset
from foundation.data.dataset import Dataset
from foundation.errors import UsageError
from foundation.evaluation.scores import Score, Scores
from foundation.evaluation.scoring import evaluate_dataset, score_dataset

HU = {"liver": 100, "kidney_right": 200, "kidney_left": 300, "liver_tumor": 400}
MM = (2.0, 3.0, 4.0)
OPTIONS = {"overlap": 0.0, "postprocess": False, "progress": False}


class ByIntensity(nn.Module):
    """A network that knows every class by its HU: what it predicts can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.config = NetworkConfig(
            name="by intensity",
            classes=tuple(ClassSpec(name, "") for name in HU),
            preprocessing=Preprocessing(
                patch_size=(16, 16, 16), spacing_mm=MM, hu_windows=((-1000.0, 1000.0),)
            ),
            divisor=1,
        )

    def forward(self, image: torch.Tensor, channels: Sequence[int] | None = None) -> torch.Tensor:
        hu = image * 2000 - 1000
        levels = torch.tensor([float(level) for level in HU.values()])
        chosen = levels if channels is None else levels[list(channels)]
        return 10 - (hu - chosen.reshape(1, -1, 1, 1, 1)).abs()


def write(root: Path, name: str, labels: np.ndarray, hu: np.ndarray) -> None:
    """Axes of the file run to the left and to the back."""
    affine = np.diag([-MM[0], -MM[1], MM[2], 1.0])
    for kind, array in (("images", hu), ("labels", labels)):
        (root / kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), root / kind / f"{name}.nii.gz")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    """Two scans: the labels merge the kidneys; one scan has a tumour, which the network misses."""
    root = tmp_path_factory.mktemp("hospital")
    body = np.full((30, 20, 16), -1000, np.int16)
    body[3:27, 3:17, 2:14] = 0
    labels = np.zeros(body.shape, np.uint8)
    labels[4:14, 4:14, 4:10] = 1
    labels[16:20, 5:9, 4:8] = 3
    labels[22:26, 5:9, 4:8] = 3
    hu = body.copy()
    hu[4:14, 4:14, 4:9] = HU["liver"]  # without its last plane
    hu[16:20, 5:9, 4:8] = HU["kidney_left"]
    hu[22:26, 5:9, 4:8] = HU["kidney_right"]
    write(root, "one", labels, hu)
    with_tumour = labels.copy()
    with_tumour[6:8, 6:8, 6:8] = 2
    write(root, "two", with_tumour, hu)
    well = hu.copy()
    well[20, 14, 11] = HU["liver_tumor"]
    write(root, "three", labels, well)
    (root / "hospital.yaml").write_text(
        "name: hospital\nlayout: nifti\nimages: 'images/{id}.nii.gz'\n"
        "labels: 'labels/{id}.nii.gz'\n"
        "classes: {1: liver, 2: liver_tumor, 3: kidney}\n"
    )
    return get_dataset(root / "hospital.yaml"), root


def test_masks_are_compared_on_the_grid_of_the_file(tree: tuple[Dataset, Path]) -> None:
    found = evaluate_dataset(
        ByIntensity(), *tree, hd95=True, findings=["liver tumor"], tolerance_mm=3.9, **OPTIONS
    )
    dataset, _ = tree
    by_key = {(row.case, row.name): row for row in found.rows}
    assert sorted({row.name for row in found.rows}) == ["kidney", "liver", "liver_tumor"]
    liver = by_key[f"{dataset.id}/one", "liver"]
    assert liver.dice == pytest.approx(2 * 500 / (500 + 600))
    assert liver.reference_ml == pytest.approx(600 * 0.024)
    assert liver.volume_difference_ml == pytest.approx(-100 * 0.024)
    assert liver.volume_error_percent == pytest.approx(100 / 6)
    assert liver.hd95_mm == pytest.approx(4.0), "a plane is 4 mm thick"
    assert liver.nsd is not None and 0.5 < liver.nsd < 0.9
    assert by_key[f"{dataset.id}/one", "kidney"].dice == 1.0, "both sides together"
    # A tumour's voxels are the liver's: the reference of the second scan is the same.
    assert by_key[f"{dataset.id}/two", "liver"].dice == liver.dice
    missed = by_key[f"{dataset.id}/two", "liver_tumor"]
    assert (missed.dice, missed.nsd, missed.hd95_mm, missed.missed) == (0.0, 0.0, None, True)
    invented = by_key[f"{dataset.id}/three", "liver_tumor"]
    assert (invented.dice, invented.status, invented.false_positive) == (None, "empty", True)
    assert invented.predicted_ml == pytest.approx(0.024)
    assert found.mean(["liver_tumor"]) == 0.0 and found.spacing_mm is None
    calls = {each.case.split("/")[1]: (each.present, each.found) for each in found.findings}
    assert calls == {"one": (False, False), "two": (True, False), "three": (False, True)}
    assert max(each.score for each in found.findings) > 0.99


def test_scans_and_classes_are_chosen(tree: tuple[Dataset, Path], tmp_path: Path) -> None:
    dataset, root = tree
    network = ByIntensity()
    parts = dict(
        score_dataset(network, dataset, root, cases=["two", "one"], classes=["liver"], **OPTIONS)
    )
    assert [*parts] == ["two", "one"]
    joined = Scores.joined(parts.values())
    assert joined.cases == (f"{dataset.id}/two", f"{dataset.id}/one")
    assert joined.classes == ("liver",)
    again = Scores.read(joined.write(tmp_path / "scores.json"))
    assert again == joined
    with pytest.raises(UsageError, match=r"no scan four\. It has: one, three, two"):
        evaluate_dataset(network, dataset, root, cases=["four"], **OPTIONS)
    with pytest.raises(UsageError, match="None of the 1 scans shows"):
        evaluate_dataset(network, dataset, root, cases=["one"], classes=["liver_tumor"], **OPTIONS)


def test_findings_are_kept_in_the_file(tree: tuple[Dataset, Path], tmp_path: Path) -> None:
    found = evaluate_dataset(
        ByIntensity(), *tree, cases=["two"], findings=["liver_tumor"], **OPTIONS
    )
    path = found.write(tmp_path / "scores.json")
    assert Scores.read(path) == found and found.findings
    assert json.loads(path.read_text())["findings"][0]["lesions"] == 1


def test_scores_of_other_tolerances_are_not_joined() -> None:
    one, other = (Scores((Score("a", "liver", 1.0),), mm) for mm in (2.0, 3.0))
    with pytest.raises(UsageError, match="different tolerances"):
        Scores.joined([one, other])
    with pytest.raises(UsageError, match="no scan was measured"):
        Scores.joined([])
