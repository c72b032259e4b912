"""Tumours found, by patient and by lesion, counted by hand."""

import math

import numpy as np
import pytest

from foundation.errors import UsageError
from foundation.evaluation.detection import Finding, auc, find, summarise

SHAPE, MM = (20, 20, 20), (2.0, 1.0, 1.0)  # a voxel of 0.002 ml


def boxes(*corners: tuple[int, int, int], size: int = 4) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    for x, y, z in corners:
        mask[x : x + size, y : y + size, z : z + size] = True
    return mask


def test_lesions_are_found_and_missed_and_invented() -> None:
    reference = boxes((0, 0, 0), (0, 10, 0), (10, 0, 0))
    mask = boxes((0, 0, 0), (1, 10, 0), (10, 10, 10))  # one exact, one shifted, one invented
    found = find("a", "liver_tumor", mask, reference, MM)
    assert found == Finding("a", "liver_tumor", True, 0.128, True, 3, 2, 1)
    # A component of the prediction that lies on two lesions is neither of them, by IoU …
    wide = np.zeros(SHAPE, bool)
    wide[:20, :14, :] = True
    counts = {
        criterion: find("a", "t", wide, boxes((0, 0, 0), (0, 10, 0)), MM, criterion=criterion)
        for criterion in ("iou", "dice", "any", "centre")
    }
    assert [each.found_lesions for each in counts.values()] == [0, 0, 2, 0]
    assert [each.false_positives for each in counts.values()] == [1, 1, 0, 1]


def test_the_threshold_is_of_all_components_that_touch_the_lesion() -> None:
    reference = boxes((4, 4, 4), size=8)
    halves = reference.copy()
    halves[7:9] = False  # two components with a gap of two voxels: an IoU of 6/8
    for threshold, lesions in ((0.75, 1), (0.76, 0)):
        found = find("a", "t", halves, reference, MM, threshold=threshold)
        assert (found.found_lesions, found.false_positives) == (lesions, 0 if lesions else 2)
    assert find("a", "t", halves, reference, MM, criterion="dice", threshold=0.85).found_lesions
    inside = boxes((7, 7, 7), size=2)
    assert find("a", "t", inside, reference, MM, criterion="centre").found_lesions == 1
    assert find("a", "t", inside, reference, MM).found_lesions == 0  # an IoU of 1/64


def test_voxels_that_share_a_corner_are_one_lesion() -> None:
    assert find("a", "t", boxes(), boxes((0, 0, 0), (4, 4, 4)), MM).lesions == 1
    assert find("a", "t", boxes(), boxes((0, 0, 0), (5, 4, 4)), MM).lesions == 2


def test_any_predicted_voxel_is_a_positive_unless_a_least_volume_is_given() -> None:
    one = boxes((3, 3, 3), size=1)
    assert find("a", "t", one, boxes(), MM).found
    assert not find("a", "t", one, boxes(), MM, minimum_ml=0.003).found
    assert find("a", "t", one, boxes(), MM, minimum_ml=0.002).found
    small_and_large = one | boxes((10, 10, 10))
    found = find("a", "t", small_and_large, boxes(), MM, minimum_ml=0.1)
    assert (found.found, found.false_positives, found.score) == (True, 1, pytest.approx(0.128))


def test_the_score_is_the_probability_of_the_most_probable_voxels() -> None:
    probability = np.zeros(SHAPE, np.float32)
    probability[0, 0, :4] = 0.4, 0.3, 0.2, 0.1  # nothing reaches 0.5: no voxel is predicted
    nothing = boxes()
    scores = [
        find("a", "t", nothing, nothing, MM, probability=probability, minimum_ml=ml).score
        for ml in (0.0, 0.004, 0.016)
    ]
    assert scores == pytest.approx([0.4, 0.35, 1.0 / 8])


def finding(case: int, present: bool, score: float, found: bool, *counts: int) -> Finding:
    return Finding(str(case), "t", present, score, found, *counts)


def test_the_summary_counts_patients_and_lesions() -> None:
    found = summarise(
        [
            finding(0, True, 0.9, True, 2, 1, 0),
            finding(1, True, 0.4, False, 1, 0, 0),
            finding(2, True, 0.8, True, 1, 1, 1),
            finding(3, False, 0.1, False, 0, 0, 0),
            finding(4, False, 0.6, True, 0, 0, 3),
        ]
    )
    assert (found.patients, found.positives, found.lesions) == (5, 3, 4)
    assert found.sensitivity == pytest.approx(2 / 3) and found.specificity == 0.5
    assert found.lesion_sensitivity == 0.5 and found.false_positives_per_scan == 0.8
    assert found.auc == pytest.approx(5 / 6)  # one of six pairs is in the wrong order
    for low, high in (found.sensitivity_interval, found.specificity_interval, found.auc_interval):
        assert 0 < low < 0.9 and low < high <= 1


def test_without_patients_of_a_group_nothing_is_made_up() -> None:
    found = summarise([finding(0, True, 0.9, True, 1, 1, 0)])
    assert (found.specificity, found.specificity_interval, found.auc) == (None, None, None)
    assert (found.lesion_sensitivity_interval, found.false_positives_interval) == (None, None)
    assert summarise([]).false_positives_per_scan is None


def test_the_area_is_that_of_delong() -> None:
    # Five against four, no ties: the placements can be written down. Of each positive, the share of
    # negatives below it; of each negative, the share of positives above it.
    positives, negatives = [0.9, 0.8, 0.7, 0.55, 0.3], [0.6, 0.4, 0.2, 0.1]
    area, interval = auc(positives, negatives)
    of_positives, of_negatives = [1, 1, 1, 0.75, 0.5], [0.6, 0.8, 1, 1]
    assert area == pytest.approx(0.85)
    variance = np.var(of_positives, ddof=1) / 5 + np.var(of_negatives, ddof=1) / 4
    half = 1.959964 * math.sqrt(variance) / (0.85 * 0.15)
    ends = [1 / (1 + math.exp(-(math.log(0.85 / 0.15) + sign * half))) for sign in (-1, 1)]
    assert interval == pytest.approx(ends, abs=1e-6)
    assert auc([0.5, 0.5], [0.5, 0.5]) == (0.5, None), "equal scores are no certainty"
    assert auc([0.9, 0.8], [0.1, 0.2]) == (1.0, None), "no width can be told"


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(UsageError, match="one class at a time"):
        summarise([finding(0, True, 1, True, 1, 1, 0), Finding("1", "u", True, 1, True, 1, 1, 0)])
    with pytest.raises(UsageError, match="two findings"):
        summarise([finding(0, True, 1, True, 1, 1, 0)] * 2)
    with pytest.raises(UsageError, match="Unknown criterion 'dise'"):
        find("a", "t", boxes(), boxes(), MM, criterion="dise")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threshold of a lesion is 10"):
        find("a", "t", boxes(), boxes(), MM, threshold=10)
    with pytest.raises(UsageError, match="shapes"):
        find("a", "t", boxes(), boxes()[1:], MM)
