"""Dice and surface Dice of masks whose agreement is known, intervals, and files of scores."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from anatomies import ball
from monai.networks.nets import UNet
from tiny import tiny_model
from torch import nn

from foundation.config import ClassSpec, NetworkConfig, Preprocessing
from foundation.data.store.arrays import Store
from foundation.errors import UsageError
from foundation.evaluation.intervals import bootstrap, mean_of
from foundation.evaluation.metrics import dice, surface_dice
from foundation.evaluation.scores import Score, Scores, score_masks
from foundation.evaluation.scoring import (
    evaluate,
    mean_dice,
    read_masks,
    score_case,
    validate,
)

NAN = float("nan")


def mask(*voxels: int) -> np.ndarray:
    grid = np.zeros((2, 2, 2), bool)
    grid.reshape(-1)[list(voxels)] = True
    return grid


def cube(first: int, size: int = 6) -> np.ndarray:
    mask = np.zeros((20, 20, 20), bool)
    mask[first : first + size, 5:11, 5:11] = True
    return mask


# --- Dice -----------------------------------------------------------------------------------------


def test_dice_is_twice_the_overlap_over_the_sum() -> None:
    assert dice(mask(0, 1, 2), mask(2, 3)) == pytest.approx(2 / 5)
    assert dice(mask(4, 5), mask(4, 5)) == 1
    assert dice(mask(0), mask(7)) == 0
    assert dice(mask(), mask(7)) == 0


def test_a_class_that_the_reference_lacks_is_skipped() -> None:
    assert dice(mask(0), mask()) is None


# --- surface Dice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing_mm", "voxels", "expected"), [(3.0, 1, 0.714), (3.0, 2, 0.380), (1.5, 2, 0.779)]
)
def test_surface_dice_is_that_of_nikolov(spacing_mm: float, voxels: int, expected: float) -> None:
    """A ball of 20 mm that is shifted; figures of MONAI's implementation on the whole grid."""
    size = round(70 / spacing_mm)
    where = ball((size,) * 3, (size // 2,) * 3, 20 / spacing_mm + 1e-9)
    found = surface_dice(np.roll(where, voxels, 0), where, [spacing_mm] * 3, 2.0)
    assert found == pytest.approx(expected, abs=5e-4)
    assert surface_dice(where, where, [spacing_mm] * 3, 0.0) == 1.0


def test_a_shift_counts_once_it_exceeds_the_tolerance() -> None:
    moved, where = cube(5), cube(6)
    spacing_mm = (2.0, 1.0, 1.0)  # moved by 2 mm along X
    assert surface_dice(moved, where, spacing_mm, 2.0) == 1.0
    below = surface_dice(moved, where, spacing_mm, 1.9)
    assert below is not None and 0.7 < below < 0.9  # the ends are off, the long sides are not
    tight = 0.7  # millimetres that binary fractions do not hold exactly
    assert surface_dice(moved, where, (tight, 1, 1), tight) == 1.0


def test_surface_dice_counts_by_hand() -> None:
    # Two voxels, 3 mm apart. A voxel's surface passes through its eight corners: four of each are
    # 2 mm from the other voxel's, four are 3 mm.
    one, other = np.zeros((2, 8, 4, 4), bool)
    one[1, 1, 1] = other[4, 1, 1] = True
    found = [surface_dice(one, other, (1, 1, 1), mm) for mm in (1.9, 2.0, 2.9, 3.0)]
    assert found == [0.0, 0.5, 0.5, 1.0]
    # Along another axis, voxels of 2 mm: the same in millimetres as with voxels of 1 mm.
    turned = [np.moveaxis(each, 0, 2) for each in (one, other)]
    assert surface_dice(*turned, (1, 1, 2), 3.9) == 0.0
    assert surface_dice(*turned, (1, 1, 2), 4.0) == 0.5


def test_surface_dice_looks_at_the_box_of_the_masks_alone() -> None:
    large = np.zeros((400, 400, 400), bool)
    large[200:206, 205:211, 205:211] = True
    start = time.monotonic()
    assert surface_dice(large, large, (1, 1, 1), 1.0) == 1.0
    assert time.monotonic() - start < 5  # distances in the whole grid would take minutes


def test_empty_masks() -> None:
    assert surface_dice(cube(5), np.zeros_like(cube(5)), (1, 1, 1), 1.0) is None
    assert surface_dice(np.zeros_like(cube(5)), cube(5), (1, 1, 1), 1.0) == 0.0


def test_a_mask_at_the_edge_of_the_scan_has_a_surface_there() -> None:
    whole = np.ones((6, 6, 6), bool)
    inner = ball((6, 6, 6), (2.5, 2.5, 2.5), 1.0)
    found = surface_dice(inner, whole, (1, 1, 1), 0.5)
    assert found == 0.0


def test_voxels_of_unknown_label_count_for_neither_side() -> None:
    known = np.ones((20, 20, 20), bool)
    known[:6] = False  # the part of the mask that the reference lacks
    references = [("liver", cube(6)), ("spleen", np.zeros_like(cube(6)))]
    masks = {"liver": cube(5), "spleen": cube(5)}
    row, empty = score_masks("a", masks.__getitem__, references, (1, 1, 1), 1.0)
    assert row.dice == pytest.approx(5 / 6)
    assert (empty.dice, empty.nsd, empty.status, empty.predicted_ml) == (None, None, "empty", 0.216)
    row, empty = score_masks("a", masks.__getitem__, references, (1, 1, 1), 0.0, known)
    assert row.dice == pytest.approx(2 * 5 / 11)  # voxels 6 to 10 of the mask, 6 to 11 of both
    assert empty.predicted_ml == pytest.approx(0.18), "voxels of unknown label count for no volume"
    row, _ = score_masks("a", masks.__getitem__, references, (1, 1, 1))
    assert (row.dice, row.nsd, row.hd95_mm) == (pytest.approx(5 / 6), None, None)


# --- means and intervals --------------------------------------------------------------------------


def scores(*rows: tuple[str, str, float]) -> Scores:
    return Scores(tuple(Score(c, n, d, d / 2) for c, n, d in rows), 2.0, 3.0)


def test_means_are_over_scans_then_over_classes() -> None:
    found = scores(("a", "liver", 1.0), ("b", "liver", 0.5), ("b", "spleen", 0.25))
    assert found.mean(["liver"]) == 0.75
    assert found.mean(["liver", "spleen"]) == 0.5  # not the mean of the three rows
    assert found.mean(["liver"], "nsd") == 0.375
    assert found.mean(["aorta"]) is None
    assert found.by_case(["liver", "spleen"]) == {"a": 1.0, "b": 0.375}
    assert found.by_case(["spleen"]) == {"b": 0.25}


def test_fewer_than_three_scans_have_no_interval() -> None:
    assert bootstrap([0.5, 0.6]) is None
    assert bootstrap([0.5, 0.6, NAN]) is None  # the third shows nothing
    assert bootstrap([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.1, 60)
    interval = bootstrap(values)
    assert interval is not None
    error = values.std() / np.sqrt(60)  # of the mean; 1.96 of them by the central limit theorem
    assert interval == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error),
                                     abs=0.2 * error)  # fmt: skip
    assert bootstrap(values) == interval
    assert bootstrap(values, seed=1) != interval
    narrow = bootstrap(values, confidence=0.5)
    assert narrow is not None and interval[0] < narrow[0] < narrow[1] < interval[1]


def test_classes_of_one_scan_are_drawn_together() -> None:
    # Two classes that fail in the same scan scatter as one class does.
    one = np.array([0.9, 0.9, 0.1, 0.9])
    assert bootstrap(np.stack([one, one], 1)) == pytest.approx(bootstrap(one))
    table = np.array([[1.0, NAN], [1.0, 0.0], [1.0, NAN]])
    assert mean_of(table) == 0.5
    low, high = bootstrap(table) or (0, 0)
    assert (low, high) == (0.5, 1.0)  # a draw without the second scan has one class only


# --- files ----------------------------------------------------------------------------------------


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    found = scores(("a", "liver", 0.75), ("b", "vertebra L1", 0.5))
    assert Scores.read(found.write(tmp_path / "scores.json")) == found
    table = found.write(tmp_path / "scores.csv").read_text().splitlines()
    assert table[0] == (
        "case,name,dice,nsd,hd95_mm,reference_ml,predicted_ml,status,volume_error_percent"
    )
    assert table[1:] == ["a,liver,0.75,0.375,,,,present,", "b,vertebra L1,0.5,0.25,,,,present,"]
    with pytest.raises(UsageError, match=r"name it \.json or \.csv"):
        found.write(tmp_path / "scores.txt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "expected keys and values"),
        ("{", "cannot be read as JSON"),
        ('{"format_version": 1, "rows": []}', "format_version is 1"),
        (
            '{"format_version": 2, "rows": [], "tolerance_mm": 2, "spacing_mm": 3, "cases": 1}',
            "unknown key 'cases'",
        ),
        (
            '{"format_version": 2, "rows": [{"case": "a", "name": "b", "dice": "1", "nsd": 1}], '
            '"tolerance_mm": 2, "spacing_mm": 3}',
            r"rows\[0\].dice is '1'",
        ),
    ],
)
def test_scores_are_read_strictly(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(UsageError, match=said):
        Scores.read(tmp_path / "scores.json")


# --- a model on a store ---------------------------------------------------------------------------


@pytest.mark.slow
def test_validation_measures_what_an_evaluation_measures(store: Path, tmp_path: Path) -> None:
    model = tiny_model()
    whole = Store(store)
    cases = [whole.case(key) for key in ("04/case_0", "04/case_2", "10_09/case_0")]
    found = evaluate(
        model, cases, masks=tmp_path, keep=["liver"], tolerance_mm=4.0,
        overlap=0.0, postprocess=False, progress=False,
    )  # fmt: skip
    by_class, mean = mean_dice(validate(model, cases, 0.0), model.classes)
    assert by_class == pytest.approx({name: found.mean([name]) for name in found.classes})
    assert mean == pytest.approx(found.mean(found.classes))
    assert validate(model, [], 0.0).tolist() == [[0.0] * 3] * 2  # a process without a scan
    only = validate(model, cases, 0.0, ["spleen"])
    assert only[1].tolist() == [0, 1, 0]
    (row,) = score_case(model, cases[2], overlap=0.0, postprocess=False)
    assert (row.case, row.name, row.nsd) == ("10_09/case_0", "spleen", None)
    assert found.spacing_mm == 4.0
    assert set(found.table(["spleen"])[:, 0].tolist()[2:]) == {found.mean(["spleen"])}
    # The masks that are kept are those that were measured.
    reference = cases[0].membership(["liver"])[:, 0][cases[0].read_labels()]
    mask = read_masks(tmp_path, cases[0], ["liver"])["liver"]
    agreement = 2 * (mask & reference).sum() / (mask.sum() + reference.sum())
    assert agreement == pytest.approx(found.rows[0].dice)
    assert read_masks(tmp_path, whole.case("03/case_0"), ["liver"]) == {}


class Wrapped(nn.Module):
    """A network of MONAI's, in the few lines that inference and evaluation ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.config = NetworkConfig(
            name="a UNet of MONAI",
            classes=(ClassSpec("liver", ""), ClassSpec("spleen", "")),
            preprocessing=Preprocessing(patch_size=(32, 32, 32), spacing_mm=(4.0, 4.0, 4.0)),
            activation="softmax",
            divisor=4,
        )
        self.net = UNet(3, 1, 3, channels=(4, 8, 8), strides=(2, 2))

    def forward(self, image: torch.Tensor, channels: Sequence[int] | None = None) -> torch.Tensor:
        logits: torch.Tensor = self.net(image)
        return logits


def test_a_network_of_monai_is_evaluated(store: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Wrapped()
    case = Store(store).case("04/case_0")
    found = evaluate(network, [case], overlap=0.0, postprocess=False, progress=False)
    (row,) = found.rows
    assert row.name == "liver", "it has no liver_tumor, and the case labels no spleen"
    with torch.no_grad():
        image = torch.from_numpy(case.read_ct().astype(np.float32))
        (low, high), size = network.config.preprocessing.hu_windows[0], (28, 24, 28)
        image = ((image - low) / (high - low)).clamp(0, 1)
        image = nn.functional.pad(image, (1, 1))[None, None]  # of air, to multiples of 4
        assert tuple(image.shape[2:]) == size
        whole = network.eval()(image).argmax(1)[0, :, :, 1:-1].numpy() == 1
    liver = case.membership(["liver"])[:, 0][case.read_labels()]
    assert row.dice == pytest.approx(dice(whole, liver), abs=1e-3) and row.dice > 0.01


def test_nothing_to_measure(store: Path) -> None:
    case = Store(store).case("03/case_0")  # labels the liver alone
    with pytest.raises(UsageError, match="None of the 1 scans shows any of the classes"):
        evaluate(tiny_model(), [case], ["spleen"], progress=False)
