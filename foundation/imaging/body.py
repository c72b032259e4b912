"""Where the body lies in a scan, and where its middle is: from the CT, or from labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

BODY_HU = -500.0  # above it: tissue, clothes and the table
COARSE_MM = 4.0  # the body's outline is found at about this spacing
TABLE_MM = 8.0  # an opening of this radius removes the shell of the table and blankets
TRUNK_SHARE = 0.5  # of the thickest place: arms lying alongside are thinner than that
CUT_SHARE = 0.6  # a side face cut through more of the body than this share hides how wide it is
LOPSIDED_SHARE = 0.25  # … and so do two side faces that differ by more
SPINE = ("vertebra", "spinal_cord", "sacrum")


def body_mask(hu: NDArray[Any], spacing_mm: float) -> tuple[NDArray[np.bool_], int]:
    """The body in a CT (X, Y, Z; HU, isotropic) without the table, on a coarse grid.

    Returns (mask, step): voxel i of the mask is voxel i × step of the CT along every axis. The
    largest piece of what is denser than air, after an opening; holes in axial planes (lungs,
    bowel gas) are filled. All False where there is only air.
    """
    step = max(1, round(COARSE_MM / spacing_mm))
    tissue = hu[::step, ::step, ::step] > BODY_HU
    rounds = max(1, round(TABLE_MM / (step * spacing_mm)))
    # The body goes on beyond the grid: an opening must not eat it from there.
    padded = np.pad(tissue, 2 * rounds, mode="edge")
    opened = ndimage.binary_opening(padded, iterations=rounds)
    inner = (slice(2 * rounds, -2 * rounds),) * 3
    labels, count = ndimage.label(opened[inner])
    if not count:
        return np.zeros_like(tissue), step
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    mask = np.asarray(labels == sizes.argmax())
    for z in range(mask.shape[2]):
        mask[:, :, z] = ndimage.binary_fill_holes(mask[:, :, z])
    return mask, step


def midline_from_body(mask: NDArray[np.bool_], step: int) -> float | None:
    """The X index (of the CT's grid) of the sagittal plane through the middle of the body.

    The median over axial planes of the middle of the trunk, which is where the body is at least
    half as thick as at its thickest: an arm alongside the trunk is thinner. None where the scan
    cuts the body at a side so that its width is unknown: a side face lies in the thick of it, or
    one of the faces cuts off clearly more than the other.
    """
    thickness = mask.sum(axis=1)  # (X, Z)
    planes = thickness.sum(axis=1)
    if not planes.any():
        return None
    cuts = planes[0] / planes.max(), planes[-1] / planes.max()
    if max(cuts) > CUT_SHARE or abs(cuts[0] - cuts[1]) > LOPSIDED_SHARE:
        return None
    middles = []
    for column in thickness.T[thickness.any(axis=0)]:
        trunk = np.flatnonzero(column >= TRUNK_SHARE * column.max())
        middles.append((trunk[0] + trunk[-1]) / 2)
    return float(np.median(middles)) * step


def midline_from_labels(labels: NDArray[Any], names: Sequence[tuple[str, ...]]) -> float | None:
    """The X index of the body's middle by what is labelled, None where nothing tells.

    labels (X, Y, Z), RAS. names: label value → names of tissues or classes found there.

    The spine; else the middle between the sides of pairs that the scan holds both of; else the
    middle between aorta and inferior vena cava, which run on either side of it.
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
