"""A CT on the network's grid (RAS, its own spacing), and maps back on the grid of the file."""

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

    Attributes:
        axes: The file axis behind each RAS axis.
        flips: Whether it runs the other way.
        ras_shape: Voxels of the file's grid after that.
        ras_spacing_mm: Its spacing.
        shape: Voxels of the network's grid.
        spacing_mm: Its spacing.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    ras_shape: tuple[int, int, int]
    ras_spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    @classmethod
    def of(cls, volume: Volume, spacing_mm: Sequence[float]) -> Frame:
        """Make the frame that takes a CT to a network's grid.

        Args:
            volume: The CT as it lies in its file.
            spacing_mm: Of the network's grid along the RAS axes.

        Returns:
            The frame.
        """
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
        """Turn an array on the file's grid so that its axes are those of RAS.

        Args:
            array: On the file's grid.

        Returns:
            A view of it.
        """
        return array.transpose(self.axes)[self._steps]

    def to_network(self, source: Volume | NDArray) -> NDArray[np.float32]:
        """Resample a CT, or an array on the file's grid, to the network's grid, slice by slice.

        Linear where the network's grid is finer; where it is coarser, the mean over each network
        voxel. The published code samples linearly at any ratio, which keeps the noise of single
        voxels; at 4 mm that is no longer the averaged image that a network is trained on.

        Args:
            source: A CT, which becomes HU a slice at a time; or an array on the file's grid.

        Returns:
            An array (X, Y, Z) of `shape`, RAS.
        """
        ct = source if isinstance(source, Volume) else None
        ras = self.to_ras(source if ct is None else ct.stored)  # type: ignore[arg-type]
        grids = zip(ras.shape, self.ras_spacing_mm, self.shape, self.spacing_mm, strict=True)
        weights = [interval_weights(*grid) for grid in grids]
        resampled = np.zeros((self.shape[2], *self.shape[:2]), np.float32)  # Z first: whole planes
        for z in range(ras.shape[2]):
            numbers = ras[:, :, z]
            values = ct.scaled(numbers) if ct is not None else np.asarray(numbers, np.float32)
            plane = weights[0] @ values @ weights[1].T
            for target in np.flatnonzero(weights[2][:, z]):
                resampled[target] += weights[2][target, z] * plane
        return np.ascontiguousarray(resampled.transpose(1, 2, 0))

    def to_file(
        self, values: NDArray, start: Sequence[int], threshold: float | None = None
    ) -> tuple[NDArray, Box]:
        """Resample a box of the network's grid back to the file's grid; zero lies around the box.

        Linear where the file's grid is finer, the mean over each voxel where it is coarser.

        Args:
            values: The box (x, y, z).
            start: The index of its first voxel on the network's grid.
            threshold: If it is given, the result is where the values exceed it.

        Returns:
            The part of the file's grid that the box can reach, in the file's axes: float32, or bool
            with a threshold; and where it lies.
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
        # The first axis fastest, as in files: each plane is written in one piece.
        array = np.zeros(size, np.float32 if threshold is None else bool, order="F")
        for z in range(size[2]):
            used = np.flatnonzero(weights[2][z])
            if not used.size:
                continue
            plane = values[:, :, used].astype(np.float32) @ weights[2][z, used]
            plane = weights[0] @ plane @ weights[1].T
            array[:, :, z] = plane if threshold is None else plane > threshold
        box = [slice(0)] * 3
        parts = zip(reach, self.axes, self.flips, self.ras_shape, strict=True)
        for part, axis, flip, end in parts:
            box[axis] = slice(end - part.stop, end - part.start) if flip else part
        return array[self._steps].transpose(np.argsort(self.axes).tolist()), _triple(box)

    @property
    def _steps(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)


def interval_weights(
    source_size: int, source_mm: float, target_size: int, target_mm: float
) -> NDArray[np.float32]:
    """Compute the share of each source voxel in each target voxel, along one axis.

    Both grids have the same centre. A target voxel is the mean of the source over an interval
    around its centre, as wide as the wider of the two spacings: linear interpolation when the
    target is finer, an area average when it is coarser, and no jump between the two. Beyond the
    edge, the edge voxel goes on.

    Args:
        source_size: Voxels of the source.
        source_mm: Their size.
        target_size: Voxels of the target.
        target_mm: Their size.

    Returns:
        The weights (target_size, source_size); each row sums to 1.
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
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def window_hu(hu: Tensor, hu_windows: Sequence[tuple[float, float]]) -> Tensor:
    """Clip HU to windows, and scale each to [0, 1].

    Args:
        hu: The CT (X, Y, Z), HU.
        hu_windows: (low, high) of each window, HU.

    Returns:
        The network's input (C, X, Y, Z) in [0, 1], a channel a window.
    """
    import torch  # preparing data needs all of this module but this

    return torch.stack([((hu - low) / (high - low)).clamp(0, 1) for low, high in hu_windows])


def bounding_box(mask: NDArray, margin: int = 0) -> Box | None:
    """Find the smallest box around the nonzero voxels of a mask.

    Args:
        mask: The mask (X, Y, Z).
        margin: Voxels added on every side, as far as the grid reaches.

    Returns:
        The box; None if the mask is empty.
    """
    box = []
    for axis, others in enumerate(((1, 2), (0, 2), (0, 1))):
        hits = np.flatnonzero(mask.any(axis=others))  # ten times as fast as find_objects
        if not hits.size:
            return None
        first, stop = int(hits[0]) - margin, int(hits[-1]) + 1 + margin
        box.append(slice(max(0, first), min(mask.shape[axis], stop)))
    return _triple(box)


def _triple(values: Iterable[Any]) -> tuple[Any, Any, Any]:
    x, y, z = values
    return x, y, z
