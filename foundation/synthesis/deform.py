"""Where a patch lies in an anatomy and how it is deformed: positions, and the values found there.

All positions are in voxels of the anatomy's label map, in RAS order; its spacing is FINE_MM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from foundation.synthesis.anatomy import FINE_MM, Anatomy
from foundation.synthesis.fields import enlarge, rotation

# Centre (3,) and reach in voxels, and how much tissue swells there; below 0 it shrinks.
Bump = tuple[NDArray[np.float64], float, float]

_HOLLOW_SACS = ("urinary_bladder", "stomach", "gallbladder")  # their filling varies most


def draw_centre(
    anatomy: Anatomy, extent_mm: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Draw a point to centre a patch on: near a class, rare ones too; anywhere if there is none.

    Args:
        anatomy: Where the patch is cut from.
        extent_mm: Length of the patch's edges.
        rng: The source of chance.

    Returns:
        Position (3,) in voxels.
    """
    centres = list(anatomy.centres.values())
    if centres:
        positions = centres[int(rng.integers(len(centres)))]
        position = positions[int(rng.integers(len(positions)))]
    else:
        position = rng.integers(anatomy.label_map.shape)
    centre = position + rng.normal(0, 30 / FINE_MM, 3)
    # Near the ends of a map most of the patch would be empty.
    ends = np.minimum(0.25 * extent_mm / FINE_MM, np.array(anatomy.label_map.shape) / 2)
    return np.asarray(centre.clip(ends, np.array(anatomy.label_map.shape) - ends))


def draw_positions(
    size: int,
    fine_per_voxel: int,
    spacing_mm: float,
    centre: NDArray[np.float64],
    bumps: Iterable[Bump],
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Tensor:
    """Draw where the voxels of a patch lie: affine and elastic, then `bumps` one after the other.

    It is computed on every second voxel and enlarged: all of it is smooth, and that is several
    times faster.

    Args:
        size: Voxels of the patch along each axis.
        fine_per_voxel: Positions for each of them along each axis: 2 to average afterwards.
        spacing_mm: Of the patch, isotropic.
        centre: Of the patch, (3,) in voxels of the label map.
        bumps: See `draw_bumps`.
        rng: The source of chance for angles, scales and amplitudes.
        generator: The source of chance for the elastic field.

    Returns:
        Positions (3, X, Y, Z) in voxels of the label map.
    """
    fine_size = size * fine_per_voxel
    nodes = max(2, size // 2)
    angles = rng.normal(0, (0.07, 0.07, 0.14))  # people lie turned about Z, hardly tilted
    scale = np.exp(rng.normal(0, 0.1) + rng.normal(0, 0.09, 3)).clip(0.7, 1.4)
    matrix = rotation(angles) @ np.diag(1 / scale) * (spacing_mm / fine_per_voxel / FINE_MM)
    line = torch.linspace(-0.5, 0.5, nodes) * (fine_size - 1)
    grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).reshape(3, -1)
    positions = (torch.from_numpy(matrix).float() @ grid).view(3, nodes, nodes, nodes)
    positions += torch.from_numpy(centre).float()[:, None, None, None]
    # Coarse shifts move organs against each other, fine ones bend their outlines.
    shift = _elastic_field(5, rng.uniform(0, 12), generator)
    shift = shift + _elastic_field(11, rng.uniform(0, 4), generator)
    positions += enlarge(shift, (nodes,) * 3)
    for bump in bumps:
        apply_bump(positions, *bump)
    return enlarge(positions, (fine_size,) * 3)


def draw_bumps(anatomy: Anatomy, rng: np.random.Generator) -> Iterator[Bump]:
    """Draw places where tissue swells or shrinks.

    Whole organs and random places alike; organs that fill and empty swell most. Each is drawn when
    it is asked for.

    Args:
        anatomy: Whose tissue is to swell.
        rng: The source of chance.
    """
    centres = anatomy.centres
    for name in _HOLLOW_SACS:
        if name in centres and rng.random() < 0.4:
            positions = centres[name]
            radius = positions.std(0).mean() * 5**0.5 / 1.2  # of a ball with that spread
            yield positions.mean(0), radius * rng.uniform(1.2, 2.0), rng.uniform(-0.7, 0.75)
    if "colon" in centres and rng.random() < 0.3:  # distended, in places
        for _ in range(int(rng.integers(2, 7))):
            centre = _any_of(centres["colon"], rng)
            yield centre, rng.uniform(15, 35) / FINE_MM, rng.uniform(0.2, 0.65)
    classes = list(centres.values())
    for _ in range(int(rng.integers(0, 4)) if classes else 0):
        positions = classes[int(rng.integers(len(classes)))]
        if rng.random() < 0.5:
            centre = positions.mean(0)
            reach = float(np.clip(positions.std(0).mean() * 2 * rng.uniform(0.7, 1.5), 6, 35))
        else:
            centre = _any_of(positions, rng)
            reach = rng.uniform(12, 50) / FINE_MM
        yield centre, reach, rng.uniform(-0.7, 0.45)


def _any_of(positions: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
    """One of the positions (N, 3)."""
    return np.asarray(positions[int(rng.integers(len(positions)))], dtype=float)


def apply_bump(positions: Tensor, centre: NDArray[np.float64], reach: float, amount: float) -> None:
    """Magnify or shrink what lies around a centre, in place.

    The radius r becomes r (1 - amount exp(-r² / 2 reach²)), which grows with r for
    -2 < amount < 1: nothing folds.

    Args:
        positions: (3, X, Y, Z), in voxels of the label map; changed.
        centre: (3,), in voxels of the label map.
        reach: In voxels.
        amount: Above 0 to magnify, below to shrink.
    """
    offsets = [positions[axis] - float(centre[axis]) for axis in range(3)]
    squared = offsets[0].square()
    for offset in offsets[1:]:
        squared += offset.square()
    factor = squared.mul_(-0.5 / reach**2).exp_().mul_(amount)
    for axis, offset in enumerate(offsets):
        positions[axis] -= offset * factor


def _elastic_field(nodes: int, amplitude_mm: float, generator: torch.Generator) -> Tensor:
    """Smooth random shifts (3, 16, 16, 16) in voxels of the label map, from a grid of nodes."""
    drawn = torch.randn(1, 3, *(nodes + 2,) * 3, generator=generator)
    # Averaging keeps the field from folding; 2.5 restores its amplitude.
    smooth = functional.avg_pool3d(drawn, 3, 1) * (2.5 * amplitude_mm / FINE_MM)
    return enlarge(smooth[0], (16, 16, 16))


# --- values at positions --------------------------------------------------------------------------


def gather(volume: Tensor, positions: Tensor, fill: float) -> Tensor:
    """Take the nearest values of a volume at voxel positions.

    Args:
        volume: Values (x, y, z).
        positions: (3, X, Y, Z), in voxels of `volume`.
        fill: The value outside of the volume.

    Returns:
        Values (X, Y, Z).
    """
    # One flat index and a selection along one axis: several times faster than `grid_sample`.
    nearest = positions.round().to(torch.int32)
    inside = torch.ones(positions.shape[1:], dtype=torch.bool)
    flat = torch.zeros(positions.shape[1:], dtype=torch.int32)
    for axis, length in enumerate(volume.shape):
        clamped = nearest[axis].clamp(0, length - 1)
        inside &= nearest[axis] == clamped
        flat.mul_(length).add_(clamped)
    values = volume.reshape(-1).index_select(0, flat.view(-1)).view(flat.shape)
    return values.masked_fill_(~inside, fill)


def interpolate(volume: Tensor, positions: Tensor) -> Tensor:
    """Take linear values of a volume at voxel positions; outside of it, those of its edge.

    Args:
        volume: Values (x, y, z).
        positions: (3, X, Y, Z), in voxels of `volume`.

    Returns:
        Values (X, Y, Z).
    """
    sizes = torch.tensor(volume.shape, dtype=torch.float32)[:, None, None, None]
    scaled = (2 * positions / (sizes - 1) - 1).permute(1, 2, 3, 0).flip(-1)[None]
    values: Tensor = functional.grid_sample(
        volume[None, None], scaled, align_corners=True, padding_mode="border"
    )
    return values[0, 0]


def interpolate_smooth(volume: Tensor, positions: Tensor) -> Tensor:
    """`interpolate` of a smooth volume, computed on every second voxel: several times faster.

    Args:
        volume: Values (x, y, z).
        positions: (3, X, Y, Z), in voxels of `volume`.

    Returns:
        Values (X, Y, Z).
    """
    values = interpolate(volume, positions[:, ::2, ::2, ::2])
    size = positions.shape[1:]
    return functional.interpolate(values[None, None], size=size, mode="trilinear")[0, 0]


def majority(fine_labels: Tensor, factor: int) -> Tensor:
    """Return coarse labels from fine ones.

    The middle of the sorted fine labels is taken, which is the majority where two meet.

    Args:
        fine_labels: (X, Y, Z).
        factor: How many of them along each axis make one.

    Returns:
        Labels (X / factor, Y / factor, Z / factor).
    """
    if factor == 1:
        return fine_labels
    blocks = fine_labels
    for axis in range(3):
        blocks = blocks.unfold(axis, factor, factor)
    return blocks.flatten(3).sort(dim=3).values[..., (factor**3 - 1) // 2]


def draw_field_of_view(
    anatomy: Anatomy, positions: Tensor, fine_per_voxel: int, rng: np.random.Generator
) -> Tensor:
    """Draw which voxels of a patch the scan covers.

    A label map ends somewhere, above and below; a scan ends at the sides too. Scans also end
    earlier, and that is drawn.

    Args:
        anatomy: Where the patch is cut from.
        positions: (3, X, Y, Z) of the fine voxels, in voxels of the label map.
        fine_per_voxel: How many of them along each axis make a voxel of the patch.
        rng: The source of chance.

    Returns:
        bool (X, Y, Z), of the patch.
    """
    middle = positions[(slice(None), *[slice(fine_per_voxel // 2, None, fine_per_voxel)] * 3)]
    outside = torch.zeros(middle.shape[1:], dtype=torch.bool)
    for axis in range(3) if anatomy.ct is not None else (2,):
        outside |= (middle[axis] < 0) | (middle[axis] > anatomy.label_map.shape[axis] - 1)
    for axis, probability in ((0, 0.06), (1, 0.03), (2, 0.25)):
        size = outside.shape[axis]
        if rng.random() < probability:
            outside.narrow(axis, 0, int(rng.integers(1, size // 4))).fill_(True)
        if rng.random() < probability:
            cut = int(rng.integers(1, size // 4))
            outside.narrow(axis, size - cut, cut).fill_(True)
    return ~outside
