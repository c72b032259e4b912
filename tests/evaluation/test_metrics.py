"""Dice by hand."""

import numpy as np
import pytest

from foundation.evaluation.metrics import dice


def mask(*voxels: int) -> np.ndarray:
    grid = np.zeros((2, 2, 2), bool)
    grid.reshape(-1)[list(voxels)] = True
    return grid


def test_dice_is_twice_the_overlap_over_the_sum() -> None:
    assert dice(mask(0, 1, 2), mask(2, 3)) == pytest.approx(2 / 5)
    assert dice(mask(4, 5), mask(4, 5)) == 1
    assert dice(mask(0), mask(7)) == 0
    assert dice(mask(), mask(7)) == 0


def test_a_class_that_the_reference_lacks_is_skipped() -> None:
    assert dice(mask(0), mask()) is None
