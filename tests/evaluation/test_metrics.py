"""Distances of surfaces and volumes: figures of published code, of MONAI, and by hand."""

import math

import numpy as np
import pytest
import torch
from anatomies import ball
from monai.metrics.surface_dice import compute_surface_dice

from foundation.errors import UsageError
from foundation.evaluation.metrics import (
    dice,
    hausdorff_mm,
    surface_dice,
    surface_distances,
    tolerance_of,
    tolerance_text,
    volume_ml,
)

# Cases that google-deepmind/surface-distance tests itself with, and three of our own, with what its
# version 0.1 computes: NSD at a tolerance of 1 mm, and the Hausdorff distances of 95 and 100 %.
CUBES, VOXELS = (100, 100, 100), (128, 128, 128)
BALL, OTHER = ball((40,) * 3, (18, 20, 21), 12.3), ball((40,) * 3, (20, 19, 20), 11.2)
FAR = OTHER | ball((40,) * 3, (34, 34, 34), 3)


def filled(shape: tuple[int, int, int], *where: object) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[where] = True
    return mask


@pytest.mark.parametrize(
    ("reference", "mask", "spacing_mm", "tolerance_mm", "expected"),
    [
        (filled(VOXELS, 50, 60, 70), filled(VOXELS, 50, 60, 72), (3, 2, 1), 1, (0.5, 2, 2)),
        (filled(CUBES, slice(50)), filled(CUBES, slice(51)), (2, 1, 1), 1, (0.836145008, 2, 2)),
        (BALL, OTHER, (1.7, 0.9, 2.3), 1.5, (0.504377661, 4.913247399, 6.868041933)),
        (BALL, FAR, (1.7, 0.9, 2.3), 1.5, (0.490849231, 14.739742196, 24.414749640)),
    ],
    ids=["voxels", "cubes", "balls", "a ball far off"],
)
def test_figures_are_those_of_the_published_code(
    reference: np.ndarray,
    mask: np.ndarray,
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float,
    expected: tuple[float, float, float],
) -> None:
    found = surface_distances(mask, reference, spacing_mm)
    figures = (found.dice(tolerance_mm), found.hausdorff_mm(), found.hausdorff_mm(100))
    assert figures == pytest.approx(expected, abs=1e-6)
    assert surface_dice(mask, reference, spacing_mm, tolerance_mm) == figures[0]
    assert hausdorff_mm(mask, reference, spacing_mm) == figures[1]
    # Neither mask is the first by nature.
    turned = surface_distances(reference, mask, spacing_mm)
    assert (turned.dice(tolerance_mm), turned.hausdorff_mm()) == pytest.approx(figures[:2])


def test_average_distances_are_those_of_the_published_code() -> None:
    found = surface_distances(filled(CUBES, slice(51)), filled(CUBES, slice(50)), (2, 1, 1))
    of_mask = (found.to_reference_mm * found.mask_mm2).sum() / found.mask_mm2.sum()
    of_reference = (found.to_mask_mm * found.reference_mm2).sum() / found.reference_mm2.sum()
    assert (of_reference, of_mask) == pytest.approx((0.322447073, 0.339396293), abs=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of MONAI's own inner calls
@pytest.mark.parametrize("seed", range(12))
def test_surface_dice_is_that_of_monai_with_subvoxels(seed: int) -> None:
    """On noise, whose surface has every pattern of eight voxels."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(3, 14, 3))
    mask, reference = (rng.random(shape) < rng.uniform(0.1, 0.9) for _ in range(2))
    spacing_mm, tolerance_mm = rng.uniform(0.5, 3, 3).tolist(), float(rng.uniform(0.3, 3))
    padded = [torch.from_numpy(np.pad(each, 1))[None, None] for each in (mask, reference)]
    expected = compute_surface_dice(
        *padded, [tolerance_mm], True, spacing=spacing_mm, use_subvoxels=True
    )
    found = surface_dice(mask, reference, spacing_mm, tolerance_mm)
    assert found == pytest.approx(float(expected), abs=1e-6)


def test_the_hausdorff_distance_is_the_larger_of_both_directions() -> None:
    # A voxel 20 mm away is a small share of the mask's surface: 95 % of it is near. For the
    # reference nothing is far.
    reference = filled((60, 12, 12), slice(2, 32), slice(1, 11), slice(1, 11))
    mask = reference.copy()
    mask[52, 5, 5] = True
    found = surface_distances(mask, reference, (1, 1, 1))
    assert found.hausdorff_mm(95) == 0.0
    assert found.hausdorff_mm(100) == pytest.approx(21.0)  # of its far corners; the near ones: 20
    assert surface_distances(reference, reference, (1, 1, 1)).hausdorff_mm(100) == 0.0


def test_empty_masks_have_no_distance_or_an_infinite_one() -> None:
    empty, one = np.zeros((4, 4, 4), bool), filled((4, 4, 4), 1, 1, 1)
    assert surface_distances(empty, empty, (1, 1, 1)).dice(1.0) is None
    assert surface_distances(empty, empty, (1, 1, 1)).hausdorff_mm() is None
    for pair in ((one, empty), (empty, one)):
        assert surface_distances(*pair, (1, 1, 1)).dice(1.0) == 0.0
        assert surface_distances(*pair, (1, 1, 1)).hausdorff_mm() == math.inf
    assert hausdorff_mm(one, empty, (1, 1, 1)) is None, "without a reference nothing is measured"
    assert hausdorff_mm(empty, one, (1, 1, 1)) == math.inf
    assert dice(empty, one) == 0.0


def test_volume_is_voxels_times_their_size() -> None:
    assert volume_ml(filled((10, 10, 10), slice(5)), (2.0, 1.0, 0.5)) == pytest.approx(0.5)


def test_a_class_has_its_own_tolerance_or_the_default() -> None:
    table = {"aorta": 1.0, "default": 3.0}
    assert [tolerance_of(table, name) for name in ("aorta", "liver")] == [1.0, 3.0]
    assert tolerance_of(2.0, "liver") == 2.0
    assert tolerance_text(table) == "1 to 3 mm, by class" and tolerance_text(2.0) == "2 mm"
    with pytest.raises(UsageError, match=r"No tolerance for the class 'liver'.*default: 2\.0"):
        tolerance_of({"aorta": 1.0}, "liver")
