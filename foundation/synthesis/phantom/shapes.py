"""Solids painted into a label map: ellipsoids and swept tubes, each evaluated in its bounding box.

Shapes are given in a body frame in mm (x to the patient's right, y to the front, z to the head).
Voxels see that frame through a smooth random warp, so no two phantoms repeat an outline; all of
it is a function of mm, so another voxel spacing samples the same anatomy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foundation.synthesis.fields import rotation

Floats = NDArray[np.float32]
Box = tuple[slice, slice, slice]

WARP_MM = 5.0  # amplitude of each warp mode; its slope stays below 0.35, so the warp never folds
_WARP_MODES = 2
_NOISE_MODES = 3


def _waves(
    rng: np.random.Generator, axes: Sequence[Floats], modes: int, wavelength: tuple[float, float]
) -> Floats:
    """Sum of products of one sine per axis: a smooth random field (X, Y, Z) within ±modes."""
    field = np.zeros(tuple(axis.size for axis in axes), np.float32)
    for _ in range(modes):
        length = rng.uniform(*wavelength, size=3)
        phase = rng.uniform(0, 2 * np.pi, size=3)
        x, y, z = (
            np.sin(2 * np.pi * axis / length[i] + phase[i]).astype(np.float32)
            for i, axis in enumerate(axes)
        )
        field += x[:, None, None] * y[None, :, None] * z[None, None, :]
    return field


def rotation_deg(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> NDArray[np.float64]:
    """Return the right-handed rotation about X, then Y, then Z.

    Args:
        x: Angle about X in degrees.
        y: Angle about Y in degrees.
        z: Angle about Z in degrees.

    Returns:
        Rotation matrix (3, 3).
    """
    # `rotation` turns from X to Z about Y, which is left-handed.
    return rotation(np.deg2rad([x, -y, z]), order=(2, 1, 0))


def curve(
    points: ArrayLike, radii: ArrayLike, step_mm: float = 8.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw a smooth line through control points (Catmull–Rom).

    Args:
        points: (N, 3), in mm.
        radii: (N,) or a number, in mm.
        step_mm: About how far the points of the line lie apart.

    Returns:
        Points (M, 3), and radii (M,) of 1 mm or more.
    """
    knots = np.asarray(points, float)
    values = np.column_stack([knots, np.broadcast_to(np.asarray(radii, float), len(knots))])
    padded = np.concatenate([2 * values[:1] - values[1:2], values, 2 * values[-1:] - values[-2:-1]])
    pieces = []
    for p0, p1, p2, p3 in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        count = max(1, int(np.ceil(np.linalg.norm(p2[:3] - p1[:3]) / step_mm)))
        t = np.arange(count)[:, None] / count
        bend = 2 * p0 - 5 * p1 + 4 * p2 - p3
        pieces.append(p1 + 0.5 * t * (p2 - p0 + t * (bend + t * (3 * (p1 - p2) + p3 - p0))))
    dense = np.concatenate([*pieces, values[-1:]])
    return dense[:, :3], np.maximum(dense[:, 3], 1.0)


class Canvas:
    """A label map and the warped body frame its voxels lie in.

    Attributes:
        names: Of the tissues; a tissue's label is its position.
        axes: Coordinates in mm of the voxel centres along X, Y and Z, before the warp.
        labels: uint8 (X, Y, Z), 0 at first.
        x: Warped coordinates in mm, float32 (X, Y, Z), as are `y` and `z`.
        noise: A rough field (X, Y, Z) about 0, with a root mean square of 0.6.
        everywhere: The box of all voxels.
    """

    def __init__(
        self, names: Sequence[str], axes: Sequence[Floats], rng: np.random.Generator
    ) -> None:
        self.names = list(names)
        self.axes = list(axes)
        self.labels = np.zeros(tuple(axis.size for axis in axes), np.uint8)
        grid = np.meshgrid(*axes, indexing="ij", sparse=True)
        self.x, self.y, self.z = (
            plain + np.float32(WARP_MM) * _waves(rng, axes, _WARP_MODES, (150.0, 350.0))
            for plain in grid
        )
        self.noise = _waves(rng, axes, _NOISE_MODES, (25.0, 70.0))
        self.everywhere = (slice(None), slice(None), slice(None))

    def box(self, low: ArrayLike, high: ArrayLike) -> Box:
        """Return the voxels whose warped position can lie between two corners (mm).

        Args:
            low: Corner (3,), in mm.
            high: The opposite corner (3,), in mm.

        Returns:
            Slices along X, Y and Z.
        """
        margin = WARP_MM * _WARP_MODES
        slices = [
            slice(int(np.searchsorted(axis, a - margin)), int(np.searchsorted(axis, b + margin)))
            for axis, a, b in zip(self.axes, np.asarray(low), np.asarray(high), strict=True)
        ]
        return slices[0], slices[1], slices[2]

    def put(self, name: str, box: Box, inside: NDArray[np.bool_], over: Sequence[str]) -> None:
        """Label the voxels of a box that are inside of something and hold a tissue to replace.

        Args:
            name: The tissue that they get.
            box: Slices along X, Y and Z.
            inside: bool, in the shape of the box.
            over: Tissues that are replaced.
        """
        table = np.zeros(256, bool)
        table[[self.names.index(tissue) for tissue in over]] = True
        region = self.labels[box]
        region[inside & table[region]] = self.names.index(name)

    def ellipsoid(
        self,
        name: str,
        centre: ArrayLike,
        half_axes: ArrayLike,
        over: Sequence[str],
        *,
        turn: NDArray[np.float64] | None = None,
        rough: float = 0.0,
        where: NDArray[np.bool_] | None = None,
    ) -> None:
        """Paint an ellipsoid.

        Args:
            name: Of the tissue.
            centre: (3,), in mm.
            half_axes: (3,), in mm.
            over: Tissues that it replaces.
            turn: Rotation matrix (3, 3); not turned if not given.
            rough: How much `noise` moves the surface.
            where: bool (X, Y, Z), a further condition on voxels.
        """
        matrix = np.eye(3) if turn is None else turn
        middle, half = np.asarray(centre, float), np.asarray(half_axes, float)
        # The half edges of the turned ellipsoid's box; noise reaches ±_NOISE_MODES.
        reach = np.sqrt(((matrix * half) ** 2).sum(axis=1)) * np.sqrt(1 + _NOISE_MODES * rough)
        box = self.box(middle - reach, middle + reach)
        dx, dy, dz = (
            field[box] - np.float32(c)
            for field, c in zip((self.x, self.y, self.z), middle, strict=True)
        )
        to_unit = (matrix.T / half[:, None]).astype(np.float32)
        level = sum((row[0] * dx + row[1] * dy + row[2] * dz) ** 2 for row in to_unit)
        inside = level < 1 + rough * self.noise[box] if rough else level < 1
        self.put(name, box, inside if where is None else inside & where[box], over)

    def tube(self, name: str, points: ArrayLike, radii: ArrayLike, over: Sequence[str]) -> None:
        """Paint the balls that a centre of changing radius (mm) sweeps along a polyline.

        Args:
            name: Of the tissue.
            points: (N, 3), the line's corners, in mm.
            radii: One for each point, or one for all, in mm.
            over: Tissues that it replaces.
        """
        line = np.asarray(points, float)
        radius = np.broadcast_to(np.asarray(radii, float), len(line))
        for a, b, r, s in zip(line, line[1:], radius, radius[1:], strict=False):
            big = max(r, s)
            box = self.box(np.minimum(a, b) - big, np.maximum(a, b) + big)
            if self.labels[box].size == 0:
                continue
            d = (b - a).astype(np.float32)
            dx, dy, dz = (
                field[box] - np.float32(c)
                for field, c in zip((self.x, self.y, self.z), a, strict=True)
            )
            # Where on the segment the voxel is nearest: 0 at its begin, 1 at its end.
            along = (dx * d[0] + dy * d[1] + dz * d[2]) / max(float(d @ d), 1e-6)
            along = np.clip(along, 0, 1)
            distance = (
                (dx - along * d[0]) ** 2 + (dy - along * d[1]) ** 2 + (dz - along * d[2]) ** 2
            )
            self.put(name, box, distance < (r + along * np.float32(s - r)) ** 2, over)
