"""Where the body lies in a scan, and where its middle is: from the CT, or from labels.

Two thresholds tell tissue from air. The box around the body, to which the network is confined, is
the published one and begins at FOREGROUND_HU: fat lies below it. The outline of the body begins at
TISSUE_HU, between air and fat.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from foundation.imaging.frame import Box, bounding_box

FOREGROUND_HU = -175.0  # published: the network sees the box around all that lies above
TISSUE_HU = -500.0  # above it: tissue, clothes and the table
COARSE_MM = 4.0  # the body's outline is found at about this spacing
TABLE_MM = 8.0  # an opening of this radius removes the shell of the table and blankets
TRUNK_SHARE = 0.5  # of the thickest place: arms lying alongside are thinner than that
WIDTH_CUT_SHARE = (
    0.6  # a side face cut through more of the body than this share hides how wide it is
)
LOPSIDED_SHARE = 0.25  # … and so do two side faces that differ by more
SPINE = ("vertebra", "spinal_cord", "sacrum")


def body_box(hu: NDArray[np.float32]) -> Box | None:
    """Find the smallest box around everything above FOREGROUND_HU.

    Args:
        hu: The CT (X, Y, Z), HU.

    Returns:
        The box; None where there is only air.
    """
    return bounding_box(hu > FOREGROUND_HU)


def body_mask(
    hu: NDArray[Any], spacing_mm: float | Sequence[float]
) -> tuple[NDArray[np.bool_], tuple[int, int, int]]:
    """Find the body in a CT, without the table, on a coarse grid.

    It is the largest piece of what is denser than air, after an opening; holes in axial planes
    (lungs, bowel gas) are filled.

    Args:
        hu: The CT (X, Y, Z), HU, RAS.
        spacing_mm: Of a voxel, one number or one for each axis.

    Returns:
        The mask, all False where there is only air; and the steps along X, Y and Z: voxel
        (i, j, k) of the mask is voxel (i, j, k) × steps of the CT.
    """
    size_mm = [float(mm) for mm in np.broadcast_to(spacing_mm, 3)]
    x, y, z = (max(1, round(COARSE_MM / mm)) for mm in size_mm)
    tissue = hu[::x, ::y, ::z] > TISSUE_HU
    coarse_mm = min(step * mm for step, mm in zip((x, y, z), size_mm, strict=True))
    rounds = max(1, round(TABLE_MM / coarse_mm))
    # The body goes on beyond the grid: an opening must not eat it from there.
    padded = np.pad(tissue, 2 * rounds, mode="edge")
    opened = ndimage.binary_opening(padded, iterations=rounds)
    inner = (slice(2 * rounds, -2 * rounds),) * 3
    labels, count = ndimage.label(opened[inner])
    if not count:
        return np.zeros_like(tissue), (x, y, z)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return fill_axial_holes(np.asarray(labels == sizes.argmax())), (x, y, z)


def fill_axial_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fill what a mask (X, Y, Z) encloses in each axial plane.

    It is what scipy's `binary_fill_holes` gives of each plane, in one pass over the volume.
    """
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[:, 1, 1] = in_plane[1, :, 1] = True
    around, count = ndimage.label(~mask, structure=in_plane)
    is_outside = np.zeros(count + 1, bool)
    for side in (around[0], around[-1], around[:, 0], around[:, -1]):
        is_outside[side] = True
    is_outside[0] = False  # the mask itself
    return np.asarray(~is_outside[around])


def midline_from_ct(hu: NDArray[Any], spacing_mm: float | Sequence[float]) -> float | None:
    """Find the sagittal plane through the middle of the body.

    In each axial plane the trunk is where the body is at least half as thick as at its thickest: an
    arm alongside the trunk is thinner. The middle is the median of the trunks' middles.

    Args:
        hu: The CT (X, Y, Z), HU, RAS.
        spacing_mm: Of a voxel, one number or one for each axis.

    Returns:
        The index along X; None where the scan cuts the body at a side so that its width is unknown:
        a side face lies in the thick of it, or one of the faces cuts off clearly more than the
        other.
    """
    mask, steps = body_mask(hu, spacing_mm)
    thickness = mask.sum(axis=1)  # (X, Z)
    planes = thickness.sum(axis=1)
    if not planes.any():
        return None
    cuts = planes[0] / planes.max(), planes[-1] / planes.max()
    if max(cuts) > WIDTH_CUT_SHARE or abs(cuts[0] - cuts[1]) > LOPSIDED_SHARE:
        return None
    middles = []
    for column in thickness.T[thickness.any(axis=0)]:
        trunk = np.flatnonzero(column >= TRUNK_SHARE * column.max())
        middles.append((trunk[0] + trunk[-1]) / 2)
    return float(np.median(middles)) * steps[0]


def midline_from_labels(labels: NDArray[Any], names: Sequence[tuple[str, ...]]) -> float | None:
    """Find the body's middle by what is labelled.

    It is the spine; else the middle between the sides of pairs that the scan holds both of; else
    the middle between aorta and inferior vena cava, which run on either side of it.

    Args:
        labels: Label map (X, Y, Z), RAS.
        names: Label value → names of tissues or classes found there.

    Returns:
        The index along X; None where nothing tells.
    """
    # (X, values): voxels of each value in each sagittal plane.
    count = np.stack([np.bincount(plane.ravel(), minlength=len(names)) for plane in labels])
    spine = _plane_profile(count, names, lambda name: name.startswith(SPINE))
    if spine.any():
        return float(np.searchsorted(np.cumsum(spine), spine.sum() / 2))
    bases = {n.removesuffix("_left") for value in names for n in value if n.endswith("_left")}
    pairs = [(f"{base}_left", f"{base}_right") for base in sorted(bases)]
    middles = [m for pair in pairs if (m := _between(count, names, pair)) is not None]
    if middles:
        return float(np.median(middles))
    return _between(count, names, ("aorta", "inferior_vena_cava"))


def _between(
    count: NDArray[np.int64], names: Sequence[tuple[str, ...]], pair: Iterable[str]
) -> float | None:
    """The middle between the centres of two structures; None where one is missing or cut."""
    centres = []
    for wanted in pair:
        profile = _plane_profile(count, names, wanted.__eq__)
        if not profile.any() or profile[0] or profile[-1]:
            return None
        centres.append(float(profile @ np.arange(len(profile)) / profile.sum()))
    return float(np.mean(centres))


def _plane_profile(
    count: NDArray[np.int64], names: Sequence[tuple[str, ...]], wanted: Any
) -> NDArray[np.int64]:
    values = [v for v, found in enumerate(names) if any(wanted(name) for name in found)]
    return np.asarray(count[:, values].sum(axis=1))
