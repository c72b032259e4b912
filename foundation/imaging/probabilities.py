"""Probabilities of one class on the network's grid, cropped to where they matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foundation.imaging.frame import bounding_box

NEGLIGIBLE = 0.05  # boxes are cropped to probabilities above this
QUANTA = 255  # probabilities are kept as uint8: steps of 0.004, a quarter of float32's memory


@dataclass(frozen=True)
class ProbabilityMap:
    """Probabilities of one class on the network's grid, cropped to where they matter.

    The box holds all probabilities from 0.05 on, and a margin; those around it count as zero.

    Attributes:
        values: (x, y, z), uint8; 255 is probability 1.
        start: Index of the first voxel in the network's grid.
    """

    values: NDArray[np.uint8]
    start: tuple[int, int, int]

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """Where `values` lies in the network's grid."""
        x, y, z = (slice(s, s + n) for s, n in zip(self.start, self.values.shape, strict=True))
        return x, y, z

    def full(self, shape: Sequence[int]) -> NDArray[np.uint8]:
        """Return the probabilities × 255 on the network's whole grid, which has this shape."""
        grid = np.zeros(shape, np.uint8)
        grid[self.box] = self.values
        return grid


def crop(values: NDArray[np.uint8], offset: Sequence[int] = (0, 0, 0)) -> ProbabilityMap:
    """Crop probabilities to the part that matters.

    Args:
        values: (X, Y, Z), uint8, probabilities × 255, of which some reach 0.05.
        offset: Index of their first voxel in the network's grid.

    Returns:
        The map, with a margin of one voxel.
    """
    box = bounding_box(values >= NEGLIGIBLE * QUANTA, margin=1)
    assert box is not None
    x, y, z = (part.start + skip for part, skip in zip(box, offset, strict=True))
    return ProbabilityMap(values[box].copy(), (x, y, z))


def join(parts: Sequence[ProbabilityMap]) -> ProbabilityMap:
    """Join the maps of one class from several slabs into one.

    Args:
        parts: One or more, which do not overlap.

    Returns:
        The map in the box around all of them.
    """
    starts = np.array([part.start for part in parts])
    stops = np.array([[side.stop for side in part.box] for part in parts])
    low = starts.min(axis=0)
    values = np.zeros(stops.max(axis=0) - low, np.uint8)
    for part in parts:
        x, y, z = (slice(s.start - o, s.stop - o) for s, o in zip(part.box, low, strict=True))
        values[x, y, z] = part.values
    return ProbabilityMap(values, (int(low[0]), int(low[1]), int(low[2])))
