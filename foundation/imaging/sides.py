"""Left and right of a paired organ: of a label that merges both sides, or of two that mix them up.

RAS: the patient's right has the larger X index. Decided per connected component, so that an organ
stays whole where it reaches over the body's middle:

- a component with a waist near the middle is both organs in one (touching lungs, lungs joined by
  the trachea, a horseshoe kidney) and is cut there;
- two components that lie well apart are the right and the left one;
- a single one lies on the side of its centre;
- a small piece near a large one belongs to it.

Limits: the cut is a plane, so a tongue of one lung that crosses it goes to the other. An organ in
the very middle (a pelvic kidney) goes by its centre. Without a middle (a scan of one half of the
body without its spine) a lone organ is `UNDECIDED`: no side is made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from foundation.imaging.frame import bounding_box

NEITHER, RIGHT, LEFT, UNDECIDED = 0, 1, 2, 3
BIG_SHARE = 0.05  # of the largest component; what is smaller may be debris
SECOND_SHARE = 0.1  # a second component this large may be the other organ
APART_MM = 45.0  # centres of a right and a left organ are at least this far apart, side to side
DEBRIS_MM = 25.0  # debris lies within this distance of its organ
LEAN_MM = 25.0  # how far the middle between two organs may be off the body's
WAIST_REACH_MM = 40.0  # where a waist is searched, around the body's middle
WAIST_SHARE = 0.5  # a waist has at most this share of the largest cross-section on either side
WAIST_LEAST = 0.1  # of the voxels lie on each side of it
SPAN_SHARE = 0.75  # of a component's voxels on one side: then all of it belongs there
POINTS = 20_000  # of a large component, to measure distances to

Sides = NDArray[np.uint8]


def split_sides(
    mask: NDArray[np.bool_],
    spacing_mm: float | Sequence[float],
    middle: float | None,
    cut_at_waist: bool,
) -> Sides:
    """Tell which side each voxel of a merged pair belongs to.

    Args:
        mask: Both organs (X, Y, Z), RAS.
        spacing_mm: Of a voxel, one number or one for each axis.
        middle: X index of the body's middle; None where unknown.
        cut_at_waist: Whether two organs in one component are cut where it is narrowest (lungs),
            otherwise at the body's middle (kidneys: an isthmus has no side of its own).

    Returns:
        RIGHT, LEFT or UNDECIDED in the mask, NEITHER elsewhere.
    """
    # Faces only, not corners: organs that merely touch stay two components.
    return _in_box([mask], spacing_mm, middle, cut_at_waist, divides=False)


def correct_sides(
    right: NDArray[np.bool_],
    left: NDArray[np.bool_],
    spacing_mm: float | Sequence[float],
    middle: float,
    cut_at_waist: bool,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Give each component of a right and of a left organ to the side it lies on.

    Two organs that touch stay two where their names tell them apart. A component that spans both
    sides without a waist is divided between them.

    Args:
        right: What is called right (X, Y, Z), RAS; it may overlap with `left`.
        left: What is called left.
        spacing_mm: Of a voxel, one number or one for each axis.
        middle: X index of the body's middle.
        cut_at_waist: As `split_sides`.

    Returns:
        The two masks, which together hold the same voxels as before, each of them once.
    """
    sides = _in_box([right, left & ~right], spacing_mm, middle, cut_at_waist, divides=True)
    return sides == RIGHT, sides == LEFT


def _in_box(
    masks: Sequence[NDArray[np.bool_]],
    spacing_mm: float | Sequence[float],
    middle: float | None,
    cut_at_waist: bool,
    divides: bool,
) -> Sides:
    """Decide the sides of masks that do not overlap, in the box around them."""
    sides = np.zeros(masks[0].shape, np.uint8)
    box = bounding_box(np.logical_or.reduce(masks))
    if box is None:
        return sides
    labels, count = ndimage.label(masks[0][box])
    for mask in masks[1:]:
        more, number = ndimage.label(mask[box])
        labels[more > 0] = more[more > 0] + count
        count += number
    planes = np.stack([np.bincount(plane.ravel(), minlength=count + 1) for plane in labels])
    planes[:, 0] = 0
    local = None if middle is None else middle - box[0].start
    sides[box] = _Components(labels, planes, spacing_mm, local, divides).decide(cut_at_waist)
    return sides


class _Components:
    """The components of one pair: labels (x, y, z), and planes (x, components + 1).

    planes: voxels of each component in each sagittal plane. middle: X index in the same box.
    divides: a component that spans both sides without a waist is divided too.
    """

    def __init__(
        self,
        labels: NDArray[Any],
        planes: NDArray[np.int64],
        spacing_mm: float | Sequence[float],
        middle: float | None,
        divides: bool,
    ) -> None:
        self.labels, self.planes, self.middle, self.divides = labels, planes, middle, divides
        self.voxel_mm = np.broadcast_to(np.asarray(spacing_mm, float), 3)
        self.spacing_mm = float(self.voxel_mm[0])  # from side to side
        self.sizes = planes.sum(axis=0)
        self.centres = np.arange(len(planes)) @ planes / np.maximum(self.sizes, 1)
        self.big = np.flatnonzero(self.sizes >= BIG_SHARE * self.sizes.max())

    def decide(self, cut_at_waist: bool) -> Sides:
        side_of = np.zeros(len(self.sizes), np.uint8)
        cuts: dict[int, float] = {
            int(c): w for c in self.big if (w := self._waist(self.planes[:, c])) is not None
        }
        threshold = self._threshold(cuts)
        for number in self.big:
            side_of[number] = self._side(self.centres[number], threshold)
        self._place_small(side_of, threshold, cuts)
        sides: Sides = side_of[self.labels]
        middle = None if cut_at_waist else self.middle
        planes = {c: waist if middle is None else middle for c, waist in cuts.items()}
        if self.divides and threshold is not None:
            planes |= dict.fromkeys(self._spanning(cuts, threshold), threshold)
        for component, plane in planes.items():
            on_right = (np.arange(len(self.planes)) > plane)[:, None, None]
            of_it = self.labels == component
            sides[of_it & on_right] = RIGHT
            sides[of_it & ~on_right] = LEFT
        return sides

    def _spanning(self, cuts: dict[int, float], threshold: float) -> list[int]:
        """Large components without a waist that belong to neither side by most of their voxels."""
        right = self.planes[np.arange(len(self.planes)) > threshold].sum(axis=0)
        share = right / np.maximum(self.sizes, 1)
        spanning = (share > 1 - SPAN_SHARE) & (share < SPAN_SHARE)
        return [int(c) for c in self.big if spanning[c] and c not in cuts]

    def _side(self, x: float, threshold: float | None) -> int:
        if threshold is None:
            return UNDECIDED
        return RIGHT if x > threshold else LEFT

    def _threshold(self, cuts: dict[int, float]) -> float | None:
        """The X index that divides whole components into right and left ones."""
        if cuts:
            return self.middle if self.middle is not None else float(next(iter(cuts.values())))
        largest = self.big[np.argsort(-self.sizes[self.big], kind="stable")]
        if len(largest) < 2 or self.sizes[largest[1]] < SECOND_SHARE * self.sizes[largest[0]]:
            return self.middle
        low, high = sorted(self.centres[largest[:2]])
        if (high - low) * self.spacing_mm < APART_MM:
            return self.middle  # two pieces of one organ, or nothing to tell
        between = float(low + high) / 2
        if self.middle is None:
            return between
        # The body may lean or turn; two kidneys do not both lie on one side for that.
        off_mm = max(low - self.middle, self.middle - high) * self.spacing_mm
        return between if 0 <= off_mm <= LEAN_MM else self.middle

    def _waist(self, area: NDArray[np.int64]) -> int | None:
        """The narrowest plane near the middle if the component is two organs in one."""
        inside = np.flatnonzero(area)
        first, last = int(inside[0]), int(inside[-1])
        if self.middle is None:
            reach, about = (last - first) / 4, (first + last) / 2
        else:
            reach, about = WAIST_REACH_MM / self.spacing_mm, self.middle
        low = max(first + 1, int(np.ceil(about - reach)))
        high = min(last - 1, int(np.floor(about + reach)))
        if low > high or (last - first) * self.spacing_mm < 2 * APART_MM:
            return None
        order = np.lexsort((np.abs(np.arange(low, high + 1) - about), area[low : high + 1]))
        waist = low + int(order[0])
        left, right = area[:waist], area[waist + 1 :]
        narrow = area[waist] <= WAIST_SHARE * min(left.max(), right.max())
        both = min(left.sum(), right.sum()) >= WAIST_LEAST * area.sum()
        return waist if narrow and both else None

    def _place_small(self, side_of: Sides, threshold: float | None, cuts: dict[int, float]) -> None:
        """Give each small component the side of the large one it lies at, else its own."""
        small = np.setdiff1d(np.arange(1, len(self.sizes)), self.big)
        if not len(small):
            return
        clouds = [self._points(int(component)) for component in self.big]
        owner = np.repeat(self.big, [len(cloud) for cloud in clouds])
        points = np.concatenate(clouds)
        tree = cKDTree(points * self.voxel_mm)
        boxes = ndimage.find_objects(self.labels)
        for component in small:
            box = boxes[component - 1]
            corner = np.array([part.start for part in box])
            opposite = np.array([part.stop - 1 for part in box])
            distance, nearest = tree.query((corner + opposite) / 2 * self.voxel_mm)
            near_mm = distance - np.linalg.norm((opposite - corner) * self.voxel_mm) / 2
            host = int(owner[nearest])
            if near_mm > DEBRIS_MM:
                side_of[component] = self._side(self.centres[component], threshold)
            elif host in cuts:
                side_of[component] = self._side(points[nearest][0], threshold)
            else:
                side_of[component] = side_of[host]

    def _points(self, component: int) -> NDArray[np.int64]:
        flat = np.flatnonzero(self.labels == component)
        every = max(1, len(flat) // POINTS)
        return np.stack(np.unravel_index(flat[::every], self.labels.shape), axis=1)


def nearest_side(
    mask: NDArray[np.bool_], right: NDArray[np.bool_], left: NDArray[np.bool_]
) -> Sides:
    """Give each voxel of a mask the side of the nearest voxel of a right and a left organ.

    It is for a lesion beside organs whose sides are labelled. One component may be divided.

    Args:
        mask: What has no side yet (X, Y, Z).
        right: The right organ.
        left: The left organ.

    Returns:
        RIGHT or LEFT in the mask, NEITHER elsewhere and where both organs are empty.
    """
    sides = np.zeros(mask.shape, np.uint8)
    targets, points = np.argwhere(mask), [np.argwhere(right), np.argwhere(left)]
    if len(targets) and sum(map(len, points)):
        tree = cKDTree(np.concatenate(points))
        _, nearest = tree.query(targets)
        sides[tuple(targets.T)] = np.where(nearest < len(points[0]), RIGHT, LEFT)
    return sides
