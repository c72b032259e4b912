"""A CT into the network's frame (RAS, fixed spacing, windowed HU), and maps back onto its grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from foundation.imaging.volumes import Volume

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Frame:
    """How the voxel grid of a file and the grid of the network lie on each other.

    The file's axes are permuted and flipped to the nearest of right, anterior, superior; an
    oblique volume is not rotated, so no voxel is invented. Along each axis the network's grid has
    its own spacing and shares its centre with the file's grid, so that a mirrored file gives the
    mirrored result.

    axes: the file axis behind each RAS axis. flips: whether it runs the other way.
    ras_shape, ras_spacing_mm: the file's grid after that. shape, spacing_mm: the network's.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    ras_shape: tuple[int, int, int]
    ras_spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    @classmethod
    def of(cls, volume: Volume, spacing_mm: Sequence[float]) -> Frame:
        """The frame that takes `volume` to a network grid of `spacing_mm`."""
        # One row for each file axis: which RAS axis it is nearest to, and its sign.
        orientation = nib.orientations.io_orientation(volume.affine)
        ras_axis = [int(axis) for axis in orientation[:, 0]]
        axes = tuple(ras_axis.index(axis) for axis in range(3))
        ras_shape = tuple(volume.shape[axis] for axis in axes)
        ras_spacing = tuple(volume.spacing_mm[axis] for axis in axes)
        shape = tuple(
            max(1, ceil(size * have / want - 1e-3))
            for size, have, want in zip(ras_shape, ras_spacing, spacing_mm, strict=True)
        )
        return cls(
            axes=_triple(axes),
            flips=_triple(bool(orientation[axis, 1] < 0) for axis in axes),
            ras_shape=_triple(ras_shape),
            ras_spacing_mm=_triple(ras_spacing),
            shape=_triple(shape),
            spacing_mm=_triple(float(mm) for mm in spacing_mm),
        )

    def to_ras(self, array: NDArray) -> NDArray:
        """A view of an array on the file's grid, with axes in the order and direction of RAS."""
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)
        return array.transpose(self.axes)[steps]

    def to_network(self, array: NDArray) -> NDArray[np.float32]:
        """Resample an array on the file's grid to the network's grid, slice by slice.

        Linear where the network's grid is finer; where it is coarser, the mean over each network
        voxel. The published code samples linearly at any ratio, which keeps the noise of single
        voxels; at 4 mm that is no longer the averaged image that a network is trained on.
        """
        ras = self.to_ras(array)
        grids = zip(ras.shape, self.ras_spacing_mm, self.shape, self.spacing_mm, strict=True)
        weights = [interval_weights(*grid) for grid in grids]
        resampled = np.zeros((self.shape[2], *self.shape[:2]), np.float32)  # Z first: whole planes
        for z in range(ras.shape[2]):
            plane = weights[0] @ np.asarray(ras[:, :, z], np.float32) @ weights[1].T
            for target in np.flatnonzero(weights[2][:, z]):
                resampled[target] += weights[2][target, z] * plane
        return np.ascontiguousarray(resampled.transpose(1, 2, 0))

    def to_file(
        self, values: NDArray, start: Sequence[int], threshold: float | None = None
    ) -> tuple[NDArray, Box]:
        """Resample a box of the network's grid back to the file's grid; zero lies around the box.

        values (x, y, z): the box, whose first voxel is `start`. Linear where the file's grid is
        finer, the mean over each voxel where it is coarser.

        Returns (array, box): `array` is the part of the file's grid that the box can reach, in the
        file's axes, and `box` where it lies: float32, or bool (`> threshold`) if one is given.
        """
        weights, reach = [], []
        for axis in range(3):
            full = interval_weights(
                self.shape[axis],
                self.spacing_mm[axis],
                self.ras_shape[axis],
                self.ras_spacing_mm[axis],
            )[:, start[axis] : start[axis] + values.shape[axis]]
            rows = np.flatnonzero(full.any(axis=1))
            first, stop = (int(rows[0]), int(rows[-1]) + 1) if rows.size else (0, 0)
            reach.append(slice(first, stop))
            weights.append(full[first:stop])
        size = tuple(part.stop - part.start for part in reach)
        array = np.zeros(size, np.float32 if threshold is None else bool)
        for z in range(size[2]):
            used = np.flatnonzero(weights[2][z])
            if not used.size:
                continue
            plane = values[:, :, used].astype(np.float32) @ weights[2][z, used]
            plane = weights[0] @ plane @ weights[1].T
            array[:, :, z] = plane if threshold is None else plane > threshold
        return self._box_in_file(array, reach)

    def _box_in_file(self, array: NDArray, reach: Sequence[slice]) -> tuple[NDArray, Box]:
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)
        box = [slice(0)] * 3
        for ras_axis, file_axis in enumerate(self.axes):
            part = reach[ras_axis]
            if self.flips[ras_axis]:
                size = self.ras_shape[ras_axis]
                part = slice(size - part.stop, size - part.start)
            box[file_axis] = part
        return array[steps].transpose(tuple(int(i) for i in np.argsort(self.axes))), _triple(box)


def interval_weights(
    source_size: int, source_mm: float, target_size: int, target_mm: float
) -> NDArray[np.float32]:
    """Share of each source voxel in each target voxel, (target_size, source_size), rows sum to 1.

    Both grids have the same centre. A target voxel is the mean of the source over an interval
    around its centre, as wide as the wider of the two spacings: linear interpolation when the
    target is finer, an area average when it is coarser, and no jump between the two. Beyond the
    edge, the edge voxel goes on.
    """
    first = (source_size * source_mm - target_size * target_mm) / 2
    centres = first + (np.arange(target_size) + 0.5) * target_mm
    edges = np.arange(source_size + 1) * source_mm
    half = max(source_mm, target_mm) / 2
    # Keeping centres on the source makes every interval meet it, and repeats the edge voxel.
    centres = centres.clip(1e-3 * source_mm, edges[-1] - 1e-3 * source_mm)[:, None]
    shared = np.minimum(centres + half, edges[1:]) - np.maximum(centres - half, edges[:-1])
    weights = shared.clip(min=0)
    weights[weights < 1e-6 * half] = 0
    normalised: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(
        np.float32
    )
    return normalised


def window_hu(hu: Tensor, hu_windows: Sequence[tuple[float, float]]) -> Tensor:
    """hu (X, Y, Z) → (C, X, Y, Z): each (low, high) window clips HU and scales it to [0, 1]."""
    import torch  # preparing data needs all of this module but this

    return torch.stack([((hu - low) / (high - low)).clamp(0, 1) for low, high in hu_windows])


def bounding_box(mask: NDArray, margin: int = 0) -> Box | None:
    """The smallest box around the nonzero voxels of a mask (X, Y, Z), or None if it is empty.

    margin: voxels added on every side, as far as the grid reaches.
    """
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        hits = np.flatnonzero(mask.any(axis=others))
        if not hits.size:
            return None
        box.append(slice(max(0, int(hits[0]) - margin), int(hits[-1]) + 1 + margin))
    return _triple(box)


def _triple(values: Iterable[Any]) -> tuple[Any, Any, Any]:
    x, y, z = values
    return x, y, z
