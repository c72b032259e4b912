"""Measures of one mask against its reference: overlap, distances between surfaces, volumes.

The surface of a mask passes between voxels: around each corner where eight voxels meet, the pattern
of these voxels gives a piece of surface with an area in mm². All measures of distance weigh each
piece by its area. Reference: Nikolov et al., 2021 (arXiv 1809.04430), whose published code and
MONAI's with subvoxels give the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from foundation.errors import UsageError
from foundation.imaging.frame import bounding_box

Mask = NDArray[np.bool_]
Tolerance = float | Mapping[str, float]
DEFAULT = "default"  # key of the classes that a table of tolerances does not name
ROUNDING_MM = 1e-6  # millimetres that binary fractions do not hold exactly are no distance
_ALL = 255  # the pattern of eight voxels that are all inside


def dice(mask: Mask, reference: Mask) -> float | None:
    """Dice coefficient of two masks.

    Args:
        mask: Any shape, bool.
        reference: Of the same shape.

    Returns:
        In [0, 1]; None where the reference is empty, since overlap then means nothing.
    """
    voxels = int(np.count_nonzero(reference))
    if not voxels:
        return None
    return 2 * int(np.count_nonzero(mask & reference)) / (int(np.count_nonzero(mask)) + voxels)


@dataclass(frozen=True)
class SurfaceDistances:
    """How far each piece of two surfaces lies from the other surface.

    Attributes:
        to_reference_mm: (N,) float64, of the mask's pieces; infinite where the reference is empty.
        mask_mm2: (N,) float64, their areas.
        to_mask_mm: (M,) float64, of the reference's pieces; infinite where the mask is empty.
        reference_mm2: (M,) float64, their areas.
    """

    to_reference_mm: NDArray[np.float64]
    mask_mm2: NDArray[np.float64]
    to_mask_mm: NDArray[np.float64]
    reference_mm2: NDArray[np.float64]

    def dice(self, tolerance_mm: float) -> float | None:
        """Compute the surface Dice (NSD): the share of both surfaces that is near the other.

        Args:
            tolerance_mm: A piece within this distance of the other surface counts as right.

        Returns:
            In [0, 1]; None where both masks are empty.
        """
        both = self.mask_mm2.sum() + self.reference_mm2.sum()
        if not both:
            return None
        within = tolerance_mm + ROUNDING_MM
        right = self.mask_mm2[self.to_reference_mm <= within].sum()
        right += self.reference_mm2[self.to_mask_mm <= within].sum()
        return float(right / both)

    def hausdorff_mm(self, percentile: float = 95.0) -> float | None:
        """Compute the Hausdorff distance, robust by a percentile.

        It is the larger of two distances: the one within which `percentile` percent of the mask's
        surface, by area, lies from the reference's, and the same the other way round. This is the
        definition of Nikolov et al. Others take the percentile over pieces without their area, or
        over both surfaces together, which gives other values.

        Args:
            percentile: In (0, 100]; 100 gives the greatest distance.

        Returns:
            Millimetres; infinite where one mask is empty, None where both are.
        """
        if not len(self.mask_mm2) and not len(self.reference_mm2):
            return None
        if not len(self.mask_mm2) or not len(self.reference_mm2):
            return float("inf")
        return max(
            _percentile(self.to_reference_mm, self.mask_mm2, percentile),
            _percentile(self.to_mask_mm, self.reference_mm2, percentile),
        )


def surface_distances(mask: Mask, reference: Mask, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Measure the distances between the surfaces of two masks, once for all measures of distance.

    A mask that ends with the grid has a surface there.

    Args:
        mask: (X, Y, Z), bool.
        reference: Of the same shape.
        spacing_mm: Distance between voxel centres along X, Y and Z.

    Returns:
        The distances, in the order of the voxels.

    Reference: Nikolov et al., 2021 (arXiv 1809.04430), section "Surface DSC" of the methods.
    """
    from monai.metrics.utils import get_code_to_measure_table

    nothing = np.zeros(0)
    box = bounding_box(mask | reference)
    if box is None:
        return SurfaceDistances(nothing, nothing, nothing, nothing)
    spacing = np.asarray(spacing_mm, float)
    measures: Any = get_code_to_measure_table  # which MONAI has no types for
    area_of, corners = measures([float(mm) for mm in spacing])
    areas_mm2 = area_of.numpy().astype(float)
    weights = corners.numpy().reshape(2, 2, 2).astype(np.uint8)
    # What lies far from both masks has no surface. Around the box lies a border of nothing.
    codes = [_codes(np.pad(each[box], 1), weights) for each in (mask, reference)]
    flat = [np.flatnonzero((code != 0) & (code != _ALL)) for code in codes]
    own = [areas_mm2[code.reshape(-1)[at]] for code, at in zip(codes, flat, strict=True)]
    points = [
        np.stack(np.unravel_index(at, codes[0].shape), axis=1) * spacing for at in flat
    ]  # (N, 3) mm
    far = [
        _nearest_mm(points[i], points[1 - i], np.isin(flat[i], flat[1 - i], assume_unique=True))
        for i in range(2)
    ]
    return SurfaceDistances(far[0], own[0], far[1], own[1])


def surface_dice(
    mask: Mask, reference: Mask, spacing_mm: Sequence[float], tolerance_mm: float
) -> float | None:
    """Surface Dice of two masks.

    Args:
        mask: (X, Y, Z), bool.
        reference: Of the same shape.
        spacing_mm: Distance between voxel centres along X, Y and Z.
        tolerance_mm: Surface within this distance of the other surface counts as right.

    Returns:
        In [0, 1]; None where the reference is empty.

    Reference: Nikolov et al., 2021 (arXiv 1809.04430).
    """
    if not reference.any():
        return None
    if not mask.any():
        return 0.0
    return surface_distances(mask, reference, spacing_mm).dice(tolerance_mm)


def hausdorff_mm(
    mask: Mask, reference: Mask, spacing_mm: Sequence[float], percentile: float = 95.0
) -> float | None:
    """Robust Hausdorff distance of two masks; see `SurfaceDistances.hausdorff_mm`.

    Args:
        mask: (X, Y, Z), bool.
        reference: Of the same shape.
        spacing_mm: Distance between voxel centres along X, Y and Z.
        percentile: In (0, 100].

    Returns:
        Millimetres; None where the reference is empty, infinite where the mask alone is.
    """
    if not reference.any():
        return None
    if not mask.any():
        return float("inf")
    return surface_distances(mask, reference, spacing_mm).hausdorff_mm(percentile)


def volume_ml(mask: Mask, spacing_mm: Sequence[float]) -> float:
    """Volume of a mask.

    Args:
        mask: (X, Y, Z), bool.
        spacing_mm: Distance between voxel centres along X, Y and Z, at right angles.

    Returns:
        Millilitres.
    """
    return int(np.count_nonzero(mask)) * float(np.prod(np.asarray(spacing_mm, float))) / 1000


def tolerance_of(tolerance_mm: Tolerance, name: str) -> float:
    """Return the tolerance of a class.

    Args:
        tolerance_mm: One for all classes; or class name → its own, where "default" stands for all
            that are not named. The paper gives none for its 32 classes.
        name: Of the class.

    Returns:
        Millimetres.

    Raises:
        UsageError: The table has neither the class nor "default".
    """
    if not isinstance(tolerance_mm, Mapping):
        return tolerance_mm
    found = tolerance_mm.get(name, tolerance_mm.get(DEFAULT))
    if found is None:
        raise UsageError(
            f"No tolerance for the class {name!r}. Add it to the table, or a line '{DEFAULT}: 2.0'."
        )
    return float(found)


def tolerance_text(tolerance_mm: Tolerance) -> str:
    """Word a tolerance for people: "2 mm", or "1 to 3 mm, by class"."""
    if not isinstance(tolerance_mm, Mapping):
        return f"{tolerance_mm:g} mm"
    low, high = min(tolerance_mm.values()), max(tolerance_mm.values())
    return f"{low:g} to {high:g} mm, by class"


def _codes(padded: Mask, weights: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The pattern of the eight voxels around each inner corner of the grid, a bit a voxel."""
    voxels = padded.view(np.uint8)
    x, y, z = (size - 1 for size in padded.shape)
    codes = np.zeros((x, y, z), np.uint8)
    for i, j, k in product(range(2), repeat=3):
        codes |= voxels[i : i + x, j : j + y, k : k + z] * weights[i, j, k]
    return codes


def _nearest_mm(
    points: NDArray[np.float64], others: NDArray[np.float64], shared: Mask
) -> NDArray[np.float64]:
    """The distance of each point to the nearest of others; `shared` are those of both."""
    far = np.full(len(points), np.inf)
    far[shared] = 0.0
    if len(others) and not shared.all():
        # Only surface is looked up: the distances of all voxels in the box would take far longer.
        far[~shared] = cKDTree(others, balanced_tree=False).query(points[~shared])[0]
    return far


def _percentile(
    far_mm: NDArray[np.float64], areas_mm2: NDArray[np.float64], percentile: float
) -> float:
    order = np.argsort(far_mm, kind="stable")
    reached = np.cumsum(areas_mm2[order]) / areas_mm2.sum()
    first = int(np.searchsorted(reached, percentile / 100))
    return float(far_mm[order[min(first, len(order) - 1)]])
