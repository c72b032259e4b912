"""Agreement with the model before a tuning: what is compared, what is skipped, what is a 0."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model

from foundation.data.store.arrays import Store, StoredCase
from foundation.evaluation import scoring as evaluation
from foundation.evaluation.agreement import NOT_COMPARED, agreement, changed, summary
from foundation.evaluation.metrics import surface_dice
from foundation.evaluation.scores import Score, Scores
from foundation.evaluation.scoring import evaluate

OLD = ("liver", "spleen", "liver_tumor")


@pytest.fixture
def case(store: Path) -> StoredCase:
    return Store(store).case("03/case_0")  # labels the liver alone


def box(case: StoredCase, length: int) -> np.ndarray:
    mask = np.zeros(case.shape, bool)
    mask[2 : 2 + length, 2:6, 2:6] = True
    return mask


def compare(case: StoredCase, folder: Path, before: np.ndarray, after: np.ndarray) -> Scores:
    """Agreement where the liver, which is labelled, has changed beyond recognition."""
    for name, spleen, liver in (("before", before, 0), ("after", after, 4)):
        masks = {"liver": box(case, liver), "spleen": spleen}
        evaluation._keep_masks(folder / name, case, OLD[:2], masks.__getitem__)
    return agreement(folder / "before", folder / "after", [case], OLD, tolerance_mm=0.0)


def test_masks_after_are_compared_with_those_before(case: StoredCase, tmp_path: Path) -> None:
    (row,) = compare(case, tmp_path, box(case, 4), box(case, 2)).rows
    assert (row.case, row.name) == (case.key, "spleen"), "labelled classes have a reference"
    assert row.dice == pytest.approx(2 * 32 / (64 + 32))
    assert row.nsd == surface_dice(box(case, 2), box(case, 4), [case.spacing_mm] * 3, 0.0)
    assert row.nsd is not None and 0.5 < row.nsd < 0.8  # one end and the sides around it coincide


def test_the_same_masks_agree_wholly(case: StoredCase, tmp_path: Path) -> None:
    (row,) = compare(case, tmp_path, box(case, 3), box(case, 3)).rows
    assert (row.dice, row.nsd) == (1.0, 1.0)


@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 0)])
def test_what_appeared_or_vanished_agrees_in_nothing(
    before: int, after: int, case: StoredCase, tmp_path: Path
) -> None:
    (row,) = compare(case, tmp_path, box(case, before), box(case, after)).rows
    assert (row.dice, row.nsd) == (0.0, 0.0)


def test_what_neither_model_sees_says_nothing(case: StoredCase, tmp_path: Path) -> None:
    found = compare(case, tmp_path, box(case, 0), box(case, 0))
    assert found.rows == () and summary(found) == {}
    assert found.mean(["spleen"]) is None and changed(found) == []


def test_a_low_agreement_is_marked_by_its_mean_over_scans() -> None:
    rows = [("a", "liver", 1.0), ("b", "liver", 0.9), ("a", "spleen", 0.94), ("a", "aorta", 0.0)]
    found = Scores(tuple(Score(c, n, d, d) for c, n, d in rows), 2.0, 3.0)
    assert changed(found) == ["spleen", "aorta"]  # 0.95 is not below 0.95
    assert summary(found)["liver"] == {"dice": 0.95, "nsd": 0.95, "scans": 2}
    assert changed(NOT_COMPARED) == []


def test_the_masks_of_a_model_are_those_that_are_compared(store: Path, tmp_path: Path) -> None:
    """Two models of other weights disagree, one with itself does not."""
    cases = [Store(store).case("03/case_0")]
    options = {"overlap": 0.0, "postprocess": False, "progress": False}
    for seed in (0, 1):
        model = tiny_model(seed)
        seeing = replace(model.config.preprocessing, threshold=0.13)  # untrained, it sees nothing
        model.config = replace(model.config, preprocessing=seeing)
        evaluate(model, cases, masks=tmp_path / str(seed), keep=OLD, **options)  # type: ignore[arg-type]
    same = agreement(tmp_path / "0", tmp_path / "0", cases, OLD, 4.0)
    other = agreement(tmp_path / "0", tmp_path / "1", cases, OLD, 4.0)
    assert same.rows and {row.dice for row in same.rows} == {1.0}
    assert other.rows and min(row.dice for row in other.rows) < 1.0
    assert {row.name for row in other.rows} <= {"spleen", "liver_tumor"}
