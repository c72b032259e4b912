"""Post-processing of masks on the network's grid, as published, with its faults mended.

What the published code does, by class, and what differs here and why:

- One largest component (26-connected) for most organs. Colon, small intestine, duodenum,
  oesophagus and aorta are tubes that a scan can cut into several true pieces (the two sides of the
  colon, both limbs of the aortic arch): pieces of at least a tenth of the largest stay.
- Portal and splenic vein: nothing below the lowest slice of the pancreas. Published code crashes
  without a pancreas; here the rule then rests.
- Lungs: published code takes the two largest components of both, the leftmost for the left lung,
  and erases both when they touch or when only one is visible. Here each piece goes to the side of
  the body it lies on, as `imaging.sides` tells them. The same holds for kidneys, adrenal glands and
  femoral heads, since the prompts of two sides are nearly identical and a network can take one for
  the other.
- Kidney and liver tumours: only within the organ, closed and widened by 3 mm. Where no organ is
  found there is nothing to compare with, and the tumour stays.

Reference: CLIP-Driven Universal Model (arXiv 2301.00785), published code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from foundation.imaging.frame import bounding_box
from foundation.imaging.sides import correct_sides

Mask = NDArray[np.bool_]

CONNECTED = np.ones((3, 3, 3), bool)  # 26 neighbours
SINGLE = (
    "spleen",
    "gallbladder",
    "liver",
    "stomach",
    "inferior_vena_cava",
    "pancreas",
    "rectum",
    "urinary_bladder",
    "prostate",
    "celiac_trunk",
)
TUBES = ("esophagus", "aorta", "duodenum", "colon", "intestine")
PAIRS = (  # right, left
    ("kidney_right", "kidney_left"),
    ("adrenal_gland_right", "adrenal_gland_left"),
    ("lung_right", "lung_left"),
    ("femur_head_right", "femur_head_left"),
)
OTHER_SIDE = dict(PAIRS) | {left: right for right, left in PAIRS}
TUMOURS = {"kidney_tumor": ("kidney_right", "kidney_left"), "liver_tumor": ("liver",)}
VEIN, PANCREAS = "portal_vein_and_splenic_vein", "pancreas"

PIECE_SHARE = 0.1  # of the largest piece: what a true piece of a tube, or of a lung, has at least
TUMOUR_MARGIN_MM = 3.0  # published: a 5³ closing and dilation at 1.5 mm


def partners(names: Iterable[str]) -> tuple[str, ...]:
    """Find the classes that the rules for some classes look at, beside these themselves.

    Args:
        names: The classes that are wanted.

    Returns:
        The others, sorted.
    """
    wanted = set(names)
    wanted |= {OTHER_SIDE[name] for name in wanted & OTHER_SIDE.keys()}
    for tumour, organs in TUMOURS.items():
        if tumour in wanted:
            wanted |= set(organs)
    if VEIN in wanted:
        wanted.add(PANCREAS)
    return tuple(sorted(wanted - set(names)))


def postprocess(
    names: Collection[str],
    mask_of: Callable[[str], Mask],
    *,
    spacing_mm: Sequence[float],
    middle: float | None = None,
) -> Iterator[tuple[str, Mask]]:
    """Clean masks; classes without a rule are passed over. An organ never disappears wholly.

    Args:
        names: Of the classes that have a mask.
        mask_of: Class name → mask (X, Y, Z), all on one RAS grid. It is called whenever a rule
            needs one, so that masks may be made on demand: all at once are large.
        spacing_mm: Of a voxel along X, Y and Z.
        middle: X index of the body's middle, see `imaging.body.midline_from_ct`; without it, sides
            stay as the network gave them.

    Yields:
        The name and the cleaned mask, one class at a time.
    """
    for name in names:
        if name in SINGLE:
            yield name, largest(mask_of(name))
        elif name in TUBES:
            yield name, largest(mask_of(name), PIECE_SHARE)
    for pair in PAIRS:
        found = [name for name in pair if name in names]
        if len(found) == 2:
            yield from _clean_pair(mask_of, pair, spacing_mm, middle)
        else:
            yield from ((name, largest(mask_of(name))) for name in found)
    if VEIN in names and PANCREAS in names:
        yield VEIN, _not_below(mask_of(VEIN), largest(mask_of(PANCREAS)))
    for tumour, organs in TUMOURS.items():
        if tumour in names and all(organ in names for organ in organs):
            pieces = [mask_of(organ) for organ in organs]
            yield tumour, _near(mask_of(tumour), pieces, spacing_mm)


def largest(mask: Mask, share: float = 1.0) -> Mask:
    """Keep the largest 26-connected component, and those that are nearly as large.

    Args:
        mask: The mask (X, Y, Z).
        share: Of the largest component's voxels, which another one needs to stay; from 1 on, the
            largest stays alone.

    Returns:
        The mask of what stays.
    """

    def keep(part: Mask) -> Mask:
        labels, count = ndimage.label(part, CONNECTED)
        if count < 2:
            return part
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        kept = sizes >= share * sizes.max()
        if share >= 1:  # of several equal ones, the first
            kept = np.arange(sizes.size) == sizes.argmax()
        return np.asarray(kept[labels])

    return _within_box(mask, keep)


def _clean_pair(
    mask_of: Callable[[str], Mask],
    pair: tuple[str, str],
    spacing_mm: Sequence[float],
    middle: float | None,
) -> Iterator[tuple[str, Mask]]:
    right, left = map(mask_of, pair)
    lungs = pair[0].startswith("lung")
    if middle is not None:
        right, left = correct_sides(right, left, spacing_mm, middle, cut_at_waist=lungs)
    share = PIECE_SHARE if lungs else 1.0
    yield pair[0], largest(right, share)
    yield pair[1], largest(left, share)


def _not_below(mask: Mask, pancreas: Mask) -> Mask:
    slices = np.flatnonzero(pancreas.any(axis=(0, 1)))
    if not slices.size:
        return mask
    cleaned = mask.copy()
    cleaned[:, :, : slices[0]] = False  # RAS: smaller Z is lower
    return cleaned if cleaned.any() else mask


def _near(tumour: Mask, pieces: Sequence[Mask], spacing_mm: Sequence[float]) -> Mask:
    """The part of a tumour in or near its organ: one component for each piece of the organ."""
    union = np.logical_or.reduce(pieces)
    if not union.any() or not tumour.any():
        return tumour
    radius = [max(1, round(TUMOUR_MARGIN_MM / mm)) for mm in spacing_mm]
    block = np.ones([2 * r + 1 for r in radius], bool)

    def widen(part: Mask) -> Mask:
        labels, count = ndimage.label(part, CONNECTED)
        if count > len(pieces):
            sizes = np.bincount(labels.ravel())
            sizes[0] = 0
            part = np.isin(labels, np.argsort(sizes)[-len(pieces) :])
        # Closing erodes from the border of the array: keep it away from there.
        padded = np.pad(part, [(2 * r, 2 * r) for r in radius])
        closed = ndimage.binary_dilation(ndimage.binary_closing(padded, block), block)
        return np.asarray(closed[tuple(slice(2 * r, -2 * r) for r in radius)])

    return tumour & _within_box(union, widen, margin=3 * max(radius))


def _within_box(mask: Mask, change: Callable[[Mask], Mask], margin: int = 0) -> Mask:
    """Apply `change` to the box around a mask: organs are small and grids large."""
    box = bounding_box(mask, margin)
    if box is None:
        return mask
    changed = np.zeros_like(mask)
    changed[box] = change(mask[box])
    return changed
