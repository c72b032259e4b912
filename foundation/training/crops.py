"""Crops of stored scans: where a patch lies in a scan, and its voxels on the patch's grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from foundation.training.sample import PatchGrid

if TYPE_CHECKING:  # reading a store needs an extra; rendered patches do without
    from foundation.data.store.arrays import StoredCase

Indices = Sequence[int] | NDArray[np.int64]
# HU float32, label values int32, and bool: whether the voxel lies in the scan; (X, Y, Z) each.
Volumes = tuple[Tensor, Tensor, Tensor]


def crop_size(case: StoredCase, grid: PatchGrid, zoom: float = 1.0) -> NDArray[np.int64]:
    """Voxels (3,) of the case that a patch takes which is enlarged by `zoom`."""
    factor = grid.spacing_mm / case.spacing_mm / zoom
    return np.maximum(1, np.rint(np.asarray(grid.size) * factor)).astype(np.int64)


def crop_start(
    middle: NDArray[np.float64], size: NDArray[np.int64], shape: Sequence[int]
) -> NDArray[np.int64]:
    """First voxel (3,) of a crop around `middle`, moved into the scan.

    Along an axis where the scan is smaller than the crop, the crop is centred on it.
    """
    full = np.asarray(shape)
    start = np.rint(middle - size / 2).astype(np.int64)
    inside = np.clip(start, 0, np.maximum(full - size, 0))
    return np.where(full >= size, inside, (full - size) // 2)


def read_crop(case: StoredCase, start: Indices, size: Indices) -> Volumes:
    """Read a part of a case that has a scan; it may reach beyond the scan."""
    hu, labels, inside = case.read([int(s) for s in start], [int(n) for n in size])
    assert hu is not None, f"{case.key} has no scan"
    return (
        torch.from_numpy(hu.astype(np.float32)),
        torch.from_numpy(labels.astype(np.int32)),
        torch.from_numpy(inside),
    )


def resample(hu: Tensor, labels: Tensor, inside: Tensor, size: Sequence[int]) -> Volumes:
    """Bring volumes (X, Y, Z) to `size`: HU linear or, where it gets coarser, averaged."""
    if tuple(hu.shape) == tuple(size):
        return hu, labels, inside
    coarser = all(new <= old for new, old in zip(size, hu.shape, strict=True))
    options: dict[str, Any] = {"mode": "area"}
    if not coarser:
        options = {"mode": "trilinear", "align_corners": False}
    image = functional.interpolate(hu[None, None], size=tuple(size), **options)[0, 0]
    # Label values and the flag, exact as floats, by nearest neighbour.
    both = torch.stack([labels.float(), inside.float()])[None]
    nearest = functional.interpolate(both, size=tuple(size), mode="nearest-exact")[0]
    return image, nearest[0].to(torch.int32), nearest[1].bool()
