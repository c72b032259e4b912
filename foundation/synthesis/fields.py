"""Smooth random fields, and small grids enlarged to volumes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def smooth_noise(
    shape: tuple[int, ...], cell: float, generator: torch.Generator, repeat: int = 1
) -> Tensor:
    """Noise (X, Y, Z) of unit standard deviation that varies over about `cell` voxels.

    repeat: draw it on a grid that many times coarser and repeat the values (much faster).
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
    """Trilinear values of a small grid (…, x, y, z) on a larger one (…, X, Y, Z); corners agree.

    Equal to torch's own interpolation, but as one matrix product for each axis: several times
    faster on a CPU, and drawing a patch consists of little else.
    """
    x, y, z = (_weights(have, want) for have, want in zip(field.shape[-3:], size, strict=True))
    field = field @ z.T
    field = y @ field
    flat = field.flatten(-2)
    enlarged: Tensor = (x @ flat).unflatten(-1, (size[1], size[2]))
    return enlarged


def look_up(table: Tensor, values: Tensor) -> Tensor:
    """The entry of `table` (N,) for each of `values`, integers of any shape: `table[values]`.

    Selecting along one axis is several times faster on a CPU than indexing in general.
    """
    return table.index_select(0, values.reshape(-1).to(torch.int32)).view(values.shape)


@lru_cache(maxsize=256)
def _weights(have: int, want: int) -> Tensor:
    """Weights (want, have) of linear interpolation along one axis."""
    place = torch.linspace(0, have - 1, want, dtype=torch.float64)
    distance = (place[:, None] - torch.arange(have)[None]).abs()
    return (1 - distance).clamp_min(0).float()
