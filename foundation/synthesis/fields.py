"""Smooth random fields, small grids enlarged to volumes, table look-ups and rotations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def smooth_noise(
    shape: tuple[int, ...], cell: float, generator: torch.Generator, repeat: int = 1
) -> Tensor:
    """Draw noise of unit standard deviation that varies over about `cell` voxels.

    Args:
        shape: Voxels along X, Y and Z.
        cell: Voxels between the independent values that are interpolated.
        generator: The source of chance.
        repeat: Interpolate on a grid that many times coarser and repeat the values: much faster,
            and good enough where so many voxels are averaged into one afterwards.

    Returns:
        Noise (X, Y, Z), float32, about 0.
    """
    drawn = [-(-size // repeat) for size in shape]
    coarse = [max(2, round(size / cell) + 1) for size in shape]
    field = enlarge(torch.randn(*coarse, generator=generator), drawn)
    field /= field.std().clamp_min(1e-3)
    for axis, size in enumerate(shape):
        if repeat > 1:
            field = field.repeat_interleave(repeat, axis).narrow(axis, 0, size)
    return field


def enlarge(field: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate a small grid trilinearly on a larger one, so that their corners agree.

    The result equals torch's own interpolation. It is computed as one matrix product for each axis,
    which is several times faster on a CPU; drawing a patch consists of little else.

    Args:
        field: Values (…, x, y, z).
        size: Voxels X, Y and Z of the larger grid.

    Returns:
        Values (…, X, Y, Z).
    """
    x, y, z = (_weights(have, want) for have, want in zip(field.shape[-3:], size, strict=True))
    planes = y @ (field @ z.T)
    enlarged: Tensor = (x @ planes.flatten(-2)).unflatten(-1, (size[1], size[2]))
    return enlarged


def look_up(table: Tensor, values: Tensor) -> Tensor:
    """Return `table[values]`, several times faster on a CPU than by general indexing.

    Args:
        table: One entry a value, (N,).
        values: Integers of any shape.

    Returns:
        Entries in the shape of `values`.
    """
    return table.index_select(0, values.reshape(-1).to(torch.int32)).view(values.shape)


def one_of(labels: Tensor, values: Collection[int]) -> Tensor:
    """Return which labels are among some values, as `torch.isin` does, several times faster.

    Args:
        labels: Integers of any shape, 0 to 511: those of a label map, a byte each, and of what the
            renderer fills a body with.
        values: What is looked for.

    Returns:
        bool, in the shape of `labels`.
    """
    table = torch.zeros(512, dtype=torch.bool)
    table[[*values]] = True
    return look_up(table, labels)


def rotation(angles: ArrayLike, order: Sequence[int] = (0, 1, 2)) -> NDArray[np.float64]:
    """Return the product of one rotation about each axis.

    Args:
        angles: About X (from Y to Z), about Y (from X to Z) and about Z (from X to Y), in radians.
        order: Axes in the order of the factors; the last factor turns a vector first.

    Returns:
        Rotation matrix (3, 3).
    """
    matrix = np.eye(3)
    for axis in order:
        angle = np.asarray(angles)[axis]
        first, second = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


@lru_cache(maxsize=256)
def _weights(have: int, want: int) -> Tensor:
    """Weights (want, have) of linear interpolation along one axis."""
    place = torch.linspace(0, have - 1, want, dtype=torch.float64)
    distance = (place[:, None] - torch.arange(have)[None]).abs()
    return (1 - distance).clamp_min(0).float()
