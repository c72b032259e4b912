"""Dice and surface Dice of masks whose agreement is known, intervals, and files of scores."""

from pathlib import Path

import numpy as np
import pytest
from anatomies import ball
from tiny import tiny_model

from foundation.data.store.arrays import Store
from foundation.errors import UsageError
from foundation.evaluation.scores import (
    Score,
    Scores,
    bootstrap,
    evaluate,
    mean_of,
    read_masks,
    surface_dice,
)
from foundation.evaluation.validation import validate_case

NAN = float("nan")


def cube(first: int, size: int = 6) -> np.ndarray:
    mask = np.zeros((20, 20, 20), bool)
    mask[first : first + size, 5:11, 5:11] = True
    return mask


# --- surface Dice ---------------------------------------------------------------------------------


def test_a_shift_counts_once_it_exceeds_the_tolerance() -> None:
    moved, where = cube(5), cube(6)
    spacing = (2.0, 1.0, 1.0)  # moved by 2 mm along X
    assert surface_dice(where, where, spacing, 0.0) == 1.0
    assert surface_dice(moved, where, spacing, 2.0) == 1.0
    # Below it: of each cube's 152 surface voxels the 36 of the face that sticks out are 2 mm off,
    # and so are the 4 in the middle of the face that lies inside of the other cube.
    assert surface_dice(moved, where, spacing, 1.9) == pytest.approx(1 - 40 / 152)


def test_surface_dice_counts_by_hand() -> None:
    # Two single voxels, 3 apart: each is its own surface.
    one, other = np.zeros((2, 8, 4, 4), bool)
    one[1, 1, 1] = other[4, 1, 1] = True
    assert surface_dice(one, other, (1, 1, 1), 2.9) == 0.0
    assert surface_dice(one, other, (1, 1, 1), 3.0) == 1.0
    # One of them twice as long: 2 of its voxels and 1 of the other's; one pair coincides.
    long = other.copy()
    long[5, 1, 1] = True
    assert surface_dice(long, other, (1, 1, 1), 0.0) == pytest.approx(2 / 3)


def test_empty_masks() -> None:
    assert surface_dice(cube(5), np.zeros_like(cube(5)), (1, 1, 1), 1.0) is None
    assert surface_dice(np.zeros_like(cube(5)), cube(5), (1, 1, 1), 1.0) == 0.0


def test_a_mask_at_the_edge_of_the_scan_has_a_surface_there() -> None:
    whole = np.ones((6, 6, 6), bool)
    inner = ball((6, 6, 6), (2.5, 2.5, 2.5), 1.0)
    found = surface_dice(inner, whole, (1, 1, 1), 0.5)
    assert found == 0.0


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
    assert bootstrap(np.stack([one, one], 1)) == bootstrap(one)
    table = np.array([[1.0, NAN], [1.0, 0.0], [1.0, NAN]])
    assert mean_of(table) == 0.5
    low, high = bootstrap(table) or (0, 0)
    assert (low, high) == (0.5, 1.0)  # a draw without the second scan has one class only


# --- files ----------------------------------------------------------------------------------------


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    found = scores(("a", "liver", 0.75), ("b", "vertebra L1", 0.5))
    assert Scores.read(found.write(tmp_path / "scores.json")) == found
    table = found.write(tmp_path / "scores.csv").read_text().splitlines()
    assert table == ["case,name,dice,nsd", "a,liver,0.75,0.375", "b,vertebra L1,0.5,0.25"]
    with pytest.raises(UsageError, match=r"name it \.json or \.csv"):
        found.write(tmp_path / "scores.txt")
    (tmp_path / "broken.json").write_text("[]")
    with pytest.raises(UsageError, match="cannot be read as scores"):
        Scores.read(tmp_path / "broken.json")


# --- a model on a store ---------------------------------------------------------------------------


def test_a_model_is_measured_as_validation_measures_it(store: Path, tmp_path: Path) -> None:
    model = tiny_model()
    whole = Store(store)
    cases = [whole.case(key) for key in ("04/case_0", "04/case_2", "10_09/case_0")]
    options = {"overlap": 0.0, "postprocess": False, "progress": False}
    found = evaluate(model, cases, masks=tmp_path, keep=["liver"], tolerance_mm=4.0, **options)
    for case in cases:
        expected = validate_case(model, case, 0.0)
        assert {r.name: r.dice for r in found.rows if r.case == case.key} == expected
    assert found.spacing_mm == 4.0
    assert set(found.table(["spleen"])[:, 0].tolist()[2:]) == {found.mean(["spleen"])}
    # The masks that are kept are those that were measured.
    reference = cases[0].membership(["liver"])[:, 0][cases[0].read_labels()]
    mask = read_masks(tmp_path, cases[0], ["liver"])["liver"]
    agreement = 2 * (mask & reference).sum() / (mask.sum() + reference.sum())
    assert agreement == pytest.approx(found.rows[0].dice)
    assert read_masks(tmp_path, whole.case("03/case_0"), ["liver"]) == {}


def test_nothing_to_measure(store: Path) -> None:
    case = Store(store).case("03/case_0")  # labels the liver alone
    with pytest.raises(UsageError, match="None of the 1 scans shows any of the classes"):
        evaluate(tiny_model(), [case], ["spleen"], progress=False)
