"""Calibration of probabilities whose error is known."""

import numpy as np
import pytest

from foundation.errors import UsageError
from foundation.evaluation.calibration import calibration


def test_probabilities_that_are_shares_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random((60, 60, 60))
    reference = rng.random((60, 60, 60)) < probability
    found = calibration(probability, reference)
    assert found.ece is not None and found.ece < 0.01
    assert found.brier == pytest.approx(1 / 6, abs=0.005)  # the mean of p (1 - p)
    sure = calibration((probability > 0.5).astype(float), reference)
    assert sure.ece is not None and sure.ece == pytest.approx(0.25, abs=0.01)
    assert [round(p) for p, _, _ in sure.bins] == [0, 1]
    assert [share for _, share, _ in sure.bins] == pytest.approx([0.25, 0.75], abs=0.01)


def test_errors_by_hand() -> None:
    probability = np.zeros((10, 10, 10))
    reference = np.zeros((10, 10, 10), bool)
    probability[2, 2, 2:6] = 0.9, 0.9, 0.9, 0.1
    reference[2, 2, 2:4] = True  # two of the three that have 0.9
    found = calibration(probability, reference)
    assert found.voxels.sum() == 4, "the box around both, not the whole grid"
    assert found.ece == pytest.approx((abs(2.7 - 2) + 0.1) / 4)
    assert found.brier == pytest.approx((3 * 0.01 + 0.81) / 4)
    whole = calibration(probability, reference, np.ones_like(reference))
    assert whole.ece == pytest.approx((abs(2.7 - 2) + 0.1) / 1000, rel=1e-6)


def test_scans_add_up() -> None:
    rng = np.random.default_rng(1)
    probability, reference = rng.random((8, 8, 8)), rng.random((8, 8, 8)) < 0.5
    here = np.ones((8, 8, 8), bool)
    here[4:] = False
    parts = [calibration(probability, reference, where) for where in (here, ~here)]
    whole, both = calibration(probability, reference, np.ones_like(here)), parts[0] + parts[1]
    assert both.ece == pytest.approx(whole.ece) and both.brier == pytest.approx(whole.brier)
    with pytest.raises(UsageError, match="do not add up"):
        whole + calibration(probability, reference, bins=5)


def test_nothing_to_count_and_no_probabilities() -> None:
    empty = np.zeros((4, 4, 4))
    assert calibration(empty, empty > 0).ece is None and calibration(empty, empty > 0).brier is None
    with pytest.raises(UsageError, match=r"run from 0 to 3"):
        calibration(np.eye(3)[None] * 3, np.ones((1, 3, 3), bool))
    with pytest.raises(UsageError, match="shape"):
        calibration(empty, np.zeros((4, 4, 5), bool))
