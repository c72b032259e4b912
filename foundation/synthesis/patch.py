"""Cut a random, deformed patch out of an anatomy, render it, and say what is labelled in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from foundation.imaging.frame import window_hu
from foundation.synthesis.anatomy import (
    COARSE_MM,
    FINE_MM,
    INDEX,
    LESION_HOSTS,
    SKIN_MARGIN,
    Anatomy,
)
from foundation.synthesis.fields import enlarge, look_up, smooth_noise
from foundation.synthesis.render import contrast_shift, render_ct
from foundation.synthesis.scanner import AIR_HU
from foundation.taxonomy import CLASSES

_LESION_SHARE = 0.4  # of the rendered patches, with one to three lesions each
_LESION_RADIUS_MM = (4.0, 28.0)
_FIRST_LESION = 201  # label value; above those of every source
# Organs that people lack: after surgery, or from birth.
_REMOVABLE = ("gallbladder", "kidney_left", "kidney_right", "spleen", "uterus", "prostate")
_HOLLOW_SACS = ("urinary_bladder", "stomach", "gallbladder")  # their filling varies most


class Sample(TypedDict):
    """One training patch.

    image (C, X, Y, Z) in [0, 1], one channel a HU window, RAS.
    voxels (M,): flat indices of the voxels the loss looks at.
    target (K, M) bool: what they belong to. annotated (K,) bool: which classes this source labels.
    weight (M,): how much each counts, 0 outside of the field of view. Voxels of small structures
    are drawn more often than their share and count less in return, so that sums estimate those
    over all voxels.
    """

    image: Tensor
    voxels: Tensor
    target: Tensor
    annotated: Tensor
    weight: Tensor


@dataclass(frozen=True)
class PatchSettings:
    """Grid of a patch and how many of its voxels the loss looks at.

    The head is three 1×1×1 convolutions, so that its cost in training falls with the voxels it is
    asked for: a random eighth of them makes a step several times faster.

    patch_size: voxels along each axis, at `spacing_mm`. oversampled: share of the patches that are
    rendered on a grid twice as fine and averaged (true partial volume, eight times the cost).
    """

    patch_size: int = 96
    spacing_mm: float = 3.0
    oversampled: float = 0.02
    hu_windows: tuple[tuple[float, float], ...] = ((-175.0, 250.0), (-1000.0, 1000.0))
    voxels: int = 32768


@dataclass(frozen=True)
class View:
    """An anatomy as a scan of it shows it: deformed, rendered, cut off where scans end.

    hu (X, Y, Z): AIR_HU where not `covered`. labels (X, Y, Z), names: label value → tissue.
    membership (256, 32) bool: the classes of each label value. covered (X, Y, Z) bool.
    """

    hu: Tensor
    labels: Tensor
    names: Mapping[int, str]
    membership: NDArray[np.bool_]
    covered: Tensor


def draw_view(
    anatomy: Anatomy,
    settings: PatchSettings,
    rng: np.random.Generator,
    generator: torch.Generator,
    lesions: bool = True,
) -> View:
    """One random view of an anatomy: deformed, rendered, perhaps with lesions grown in."""
    size = settings.patch_size
    oversampled = anatomy.ct is None and rng.random() < settings.oversampled
    fine_per_voxel = 2 if oversampled else 1
    centre = _draw_centre(anatomy, size * settings.spacing_mm, rng)
    bumps = _draw_bumps(anatomy, rng) if anatomy.ct is None else ()
    positions = _deformed_grid(
        size, fine_per_voxel, settings.spacing_mm, centre, bumps, rng, generator
    )
    fine_labels = _gather(torch.from_numpy(anatomy.label_map), positions, fill=0)
    membership, names = anatomy.membership.copy(), dict(anatomy.names)
    fine_mm = settings.spacing_mm / fine_per_voxel
    if anatomy.ct is None:
        _remove_organ(fine_labels, names, rng)
        if lesions and rng.random() < _LESION_SHARE:
            for _ in range(int(rng.integers(1, 4))):
                _grow_lesion(
                    fine_labels, membership, names, anatomy.annotated, fine_mm, rng, generator
                )
        hu = _render(anatomy, fine_labels, names, positions, fine_per_voxel, fine_mm, rng)
    else:
        hu = _interpolate(torch.from_numpy(anatomy.ct), positions)
        hu = _vary_scan(hu, fine_labels, names, rng, generator)
    labels = _majority(fine_labels, fine_per_voxel)
    covered = _field_of_view(anatomy, positions, fine_per_voxel, rng)
    hu[~covered] = AIR_HU
    return View(hu, labels, names, membership, covered)


def draw_patch(anatomy: Anatomy, settings: PatchSettings, rng: np.random.Generator) -> Sample:
    """One random view of an anatomy, windowed, with the voxels that the loss looks at."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    view = draw_view(anatomy, settings, rng, generator)
    voxels, weight = draw_voxels(view.labels, settings.voxels, generator)
    values = view.labels.reshape(-1)[voxels].long()
    belongs = torch.from_numpy(view.membership)[values]
    annotated = torch.zeros(len(CLASSES), dtype=torch.bool)
    annotated[list(anatomy.annotated)] = True
    known = torch.ones(256)
    known[list(anatomy.unknown)] = 0
    return Sample(
        image=window_hu(view.hu, settings.hu_windows),
        voxels=voxels,
        target=belongs.T.contiguous(),
        annotated=annotated,
        weight=weight * view.covered.reshape(-1)[voxels] * known[values],
    )


def draw_voxels(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flat indices (M,) of voxels for the loss, and their weights (M,): all if `count` is as many.

    Half are drawn from all voxels, half in equal parts from every label value that is there. Each
    weighs one over how often it was to be expected: weighted sums are those of a plain draw.
    """
    flat = labels.reshape(-1).long()
    if count >= len(flat):
        return torch.arange(len(flat)), torch.ones(len(flat))
    half = count // 2
    sizes = torch.bincount(flat)
    per_label = half / int((sizes > 0).sum())
    rate = (count - half) / len(flat) + per_label / sizes.clamp_min(1)  # of each label's voxels
    anywhere = torch.randint(len(flat), (count - half,), generator=generator)
    # A label's voxels stand together in the sorted order: draw a label, then a place in its run.
    order = flat.to(torch.int16).argsort(stable=True)
    ends = sizes.cumsum(0)
    values = sizes.nonzero()[:, 0]
    chosen = values[torch.randint(len(values), (half,), generator=generator)]
    place = (torch.rand(half, generator=generator, dtype=torch.float64) * sizes[chosen]).long()
    voxels = torch.cat([anywhere, order[ends[chosen] - sizes[chosen] + place]])
    plain = count / len(flat)
    return voxels, (plain / rate)[flat[voxels]].float()


def _draw_centre(
    anatomy: Anatomy, extent_mm: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A point to centre the patch on, in voxels of the label map: near a class, rare ones too.

    Anywhere, where no class is.
    """
    channels = list(anatomy.centres)
    if channels:
        positions = anatomy.centres[channels[int(rng.integers(len(channels)))]]
        position = positions[int(rng.integers(len(positions)))]
    else:
        position = rng.integers(anatomy.label_map.shape)
    centre = position + rng.normal(0, 30 / FINE_MM, 3)
    # Near the ends of a map most of the patch would be empty.
    ends = np.minimum(0.25 * extent_mm / FINE_MM, np.array(anatomy.label_map.shape) / 2)
    return np.asarray(centre.clip(ends, np.array(anatomy.label_map.shape) - ends))


def _deformed_grid(
    size: int,
    fine_per_voxel: int,
    spacing_mm: float,
    centre: NDArray[np.float64],
    bumps: Iterable[tuple[NDArray[np.float64], float, float]],
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Tensor:
    """Where the patch's fine voxels lie: affine and elastic, then `bumps` one after the other.

    centre (3,): of the patch, in voxels of the label map, as are the positions (3, X, Y, Z).
    Computed on every second voxel and enlarged: all of it is smooth, and that is several times
    faster.
    """
    fine_size = size * fine_per_voxel
    nodes = max(2, size // 2)
    angles = rng.normal(0, (0.07, 0.07, 0.14))
    scale = np.exp(rng.normal(0, 0.1) + rng.normal(0, 0.09, 3)).clip(0.7, 1.4)
    matrix = rotation(angles) @ np.diag(1 / scale) * (spacing_mm / fine_per_voxel / FINE_MM)
    line = torch.linspace(-0.5, 0.5, nodes) * (fine_size - 1)
    grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).reshape(3, -1)
    affine = torch.from_numpy(matrix).float() @ grid
    positions = affine.view(3, nodes, nodes, nodes)
    positions += torch.from_numpy(centre).float()[:, None, None, None]
    amplitudes_mm = rng.uniform(0, 12), rng.uniform(0, 4)
    shift = _elastic_field(5, amplitudes_mm[0], generator)
    shift = shift + _elastic_field(11, amplitudes_mm[1], generator)
    positions += enlarge(shift, (nodes,) * 3)
    for bump in bumps:
        _apply_bump(positions, *bump)
    return enlarge(positions, (fine_size,) * 3)


def _draw_bumps(
    anatomy: Anatomy, rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.float64], float, float]]:
    """Places where tissue swells or shrinks: centre (3,) and reach in voxels, and how much.

    Whole organs and random places alike; organs that fill and empty swell most.
    """
    channels = list(anatomy.centres)
    for name in _HOLLOW_SACS:
        if INDEX[name] in anatomy.centres and rng.random() < 0.4:
            positions = anatomy.centres[INDEX[name]]
            radius = positions.std(0).mean() * 5**0.5 / 1.2  # of a ball with that spread
            yield positions.mean(0), radius * rng.uniform(1.2, 2.0), rng.uniform(-0.7, 0.75)
    if INDEX["colon"] in anatomy.centres and rng.random() < 0.3:  # distended, in places
        positions = anatomy.centres[INDEX["colon"]]
        for _ in range(int(rng.integers(2, 7))):
            centre = positions[int(rng.integers(len(positions)))].astype(float)
            yield centre, rng.uniform(15, 35) / FINE_MM, rng.uniform(0.2, 0.65)
    for _ in range(int(rng.integers(0, 4)) if channels else 0):
        positions = anatomy.centres[channels[int(rng.integers(len(channels)))]]
        if rng.random() < 0.5:
            centre = positions.mean(0)
            reach = float(np.clip(positions.std(0).mean() * 2 * rng.uniform(0.7, 1.5), 6, 35))
        else:
            centre = positions[int(rng.integers(len(positions)))].astype(float)
            reach = rng.uniform(12, 50) / FINE_MM
        yield centre, reach, rng.uniform(-0.7, 0.45)


def _apply_bump(
    positions: Tensor, centre: NDArray[np.float64], reach: float, amount: float
) -> None:
    """Magnify (amount > 0) or shrink what lies around a centre, in place.

    positions (3, X, Y, Z) and centre in voxels of the label map. The radius r becomes
    r (1 - amount exp(-r² / 2 reach²)), which grows with r for -2 < amount < 1: nothing folds.
    """
    offsets = [positions[axis] - float(centre[axis]) for axis in range(3)]
    squared = offsets[0].square()
    for offset in offsets[1:]:
        squared += offset.square()
    factor = squared.mul_(-0.5 / reach**2).exp_().mul_(amount)
    for axis, offset in enumerate(offsets):
        positions[axis] -= offset * factor


def _remove_organ(
    labels: Tensor, names: Mapping[int, str], rng: np.random.Generator, probability: float = 0.12
) -> None:
    """Perhaps take out an organ, in place: its voxels are fat, or unlabelled tissue."""
    if rng.random() >= probability:
        return
    name = _REMOVABLE[int(rng.integers(len(_REMOVABLE)))]
    values = [value for value, label in names.items() if label == name]
    fat = next((value for value, label in names.items() if label == "fat"), 0)
    for value in values:
        labels[labels == value] = fat


def _elastic_field(nodes: int, amplitude_mm: float, generator: torch.Generator) -> Tensor:
    """Smooth random shifts (3, 16, 16, 16) in voxels of the label map, from a grid of nodes."""
    drawn = torch.randn(1, 3, *(nodes + 2,) * 3, generator=generator)
    # Averaging keeps the field from folding; 2.5 restores its amplitude.
    smooth = functional.avg_pool3d(drawn, 3, 1) * (2.5 * amplitude_mm / FINE_MM)
    return enlarge(smooth[0], (16, 16, 16))


def rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation matrix (3, 3) that turns about X, Y and Z by `angles`, in radians."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def _gather(volume: Tensor, positions: Tensor, fill: float) -> Tensor:
    """Nearest values of `volume` at voxel positions (3, X, Y, Z); `fill` outside of it."""
    nearest = positions.round().to(torch.int32)
    inside = torch.ones(positions.shape[1:], dtype=torch.bool)
    flat = torch.zeros(positions.shape[1:], dtype=torch.int32)
    for axis, length in enumerate(volume.shape):
        clamped = nearest[axis].clamp(0, length - 1)
        inside &= nearest[axis] == clamped
        flat.mul_(length).add_(clamped)
    values = volume.reshape(-1).index_select(0, flat.view(-1)).view(flat.shape)
    return values.masked_fill_(~inside, fill)


def _majority(fine_labels: Tensor, factor: int) -> Tensor:
    """Coarse labels: the middle of the sorted fine labels, the majority where two meet."""
    if factor == 1:
        return fine_labels
    blocks = fine_labels
    for axis in range(3):
        blocks = blocks.unfold(axis, factor, factor)
    return blocks.flatten(3).sort(dim=3).values[..., (factor**3 - 1) // 2]


def _grow_lesion(
    labels: Tensor,
    membership: NDArray[np.bool_],
    names: dict[int, str],
    annotated: Sequence[int],
    fine_mm: float,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> None:
    """Turn a lumpy ball inside an organ into a lesion with a label value of its own, in place.

    Nothing happens where the drawn lesion's organ is not in the patch.
    """
    lesions = [name for name in LESION_HOSTS if INDEX[name] in annotated]
    if not lesions:
        return
    lesion = lesions[int(rng.integers(len(lesions)))]
    hosts = [INDEX[name] for name in LESION_HOSTS[lesion]]
    host_values = [v for v in names if membership[v, hosts].any() and v < _FIRST_LESION]
    is_host = torch.zeros(256, dtype=torch.bool)
    is_host[host_values] = True
    host = look_up(is_host, labels)
    candidates = host.reshape(-1).nonzero()[:, 0]
    if not len(candidates):
        return
    seed = int(candidates[int(rng.integers(len(candidates)))])
    box, ball = _lumpy_ball(tuple(labels.shape), seed, fine_mm, rng, generator)
    organ = host[box]
    if lesion == "hepatic_vessel_tumor":  # it lies in the liver around a vessel
        organ = torch.from_numpy(membership[:, INDEX["liver"]])[labels[box].long()]
    value = max(_FIRST_LESION, max(names) + 1)
    # A value for each tissue that it grows into: a lesion over both lungs belongs to both.
    inside = ball & organ
    for tissue in labels[box][inside].unique().tolist():
        membership[value] = membership[tissue]
        membership[value, INDEX["hepatic_vessel"]] = False
        membership[value, INDEX[lesion]] = True
        names[value] = lesion
        labels[box][inside & (labels[box] == tissue)] = value
        value += 1
        if value > 255:
            return


def _lumpy_ball(
    shape: tuple[int, ...],
    seed: int,
    fine_mm: float,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> tuple[tuple[slice, ...], Tensor]:
    """A random ellipsoid with a lumpy surface around a flat voxel index of a grid of `shape`.

    Returns the box of the grid that holds it, and the ball in that box, bool.
    """
    origin = np.unravel_index(seed, shape)
    radius = np.exp(rng.uniform(*np.log(_LESION_RADIUS_MM))) / fine_mm
    reach = int(radius * 1.6) + 2
    box = tuple(
        slice(max(0, int(o) - reach), min(n, int(o) + reach + 1))
        for o, n in zip(origin, shape, strict=True)
    )
    x, y, z = (
        (torch.arange(s.start, s.stop) - int(o)) / (radius * rng.uniform(0.75, 1.25))
        for s, o in zip(box, origin, strict=True)
    )
    distance = (x[:, None, None] ** 2 + y[None, :, None] ** 2 + z[None, None] ** 2).sqrt()
    lumps = smooth_noise(tuple(distance.shape), 0.7 * radius, generator)
    return box, distance + 0.12 * lumps < 1


def _render(
    anatomy: Anatomy,
    labels: Tensor,
    names: Mapping[int, str],
    positions: Tensor,
    pool: int,
    fine_mm: float,
    rng: np.random.Generator,
) -> Tensor:
    """HU (X, Y, Z) of a rendered label map, around it a body of random build where it has none."""
    fat_mm, muscle_mm = rng.uniform(4, 45), rng.uniform(5, 18)
    depth_mm = None
    if anatomy.skin_mm is not None:
        in_skin_map = positions * (FINE_MM / COARSE_MM) + SKIN_MARGIN
        depth_mm = -_interpolate_smooth(torch.from_numpy(anatomy.skin_mm), in_skin_map)
        if not anatomy.has_skin:
            depth_mm = depth_mm + fat_mm + muscle_mm
    rendered = render_ct(
        labels,
        names,
        fine_mm,
        rng,
        depth_mm=depth_mm,
        fat_mm=fat_mm,
        muscle_mm=muscle_mm,
        pool=pool,
    )
    return torch.from_numpy(rendered)


def _interpolate(volume: Tensor, positions: Tensor) -> Tensor:
    """Linear values of a volume at voxel positions (3, X, Y, Z); beyond its edge, the edge's."""
    sizes = torch.tensor(volume.shape, dtype=torch.float32)[:, None, None, None]
    scaled = (2 * positions / (sizes - 1) - 1).permute(1, 2, 3, 0).flip(-1)[None]
    values: Tensor = functional.grid_sample(
        volume[None, None], scaled, align_corners=True, padding_mode="border"
    )
    return values[0, 0]


def _interpolate_smooth(volume: Tensor, positions: Tensor) -> Tensor:
    """`_interpolate` of a smooth volume, computed on every second voxel: several times faster."""
    values = _interpolate(volume, positions[:, ::2, ::2, ::2])
    return functional.interpolate(values[None, None], size=positions.shape[1:], mode="trilinear")[
        0, 0
    ]


def _vary_scan(
    hu: Tensor,
    labels: Tensor,
    names: Mapping[int, str],
    rng: np.random.Generator,
    generator: torch.Generator,
) -> Tensor:
    """A real scan seen again: other contrast in its labelled organs, gain, offset and noise."""
    if rng.random() < 0.6:
        shift = look_up(contrast_shift(names, rng), labels)
        shift = functional.avg_pool3d(shift[None, None], 3, 1, 1)[0, 0]
        hu = hu + shift * (hu > -150)
    hu = hu * rng.uniform(0.92, 1.08) + rng.normal(0, 8)
    if rng.random() < 0.3:
        hu = torch.from_numpy(ndimage.gaussian_filter(hu.numpy(), rng.uniform(0.3, 1.0)))
    return hu + rng.uniform(0, 20) * torch.randn(hu.shape, generator=generator)


def _field_of_view(
    anatomy: Anatomy, positions: Tensor, factor: int, rng: np.random.Generator
) -> Tensor:
    """Which voxels (X, Y, Z) the scan covers, bool.

    A label map ends somewhere; scans also end earlier, and that is drawn.
    """
    middle = positions[:, factor // 2 :: factor, factor // 2 :: factor, factor // 2 :: factor]
    height = middle[2]
    outside: Tensor = (height < 0) | (height > anatomy.label_map.shape[2] - 1)
    if anatomy.ct is not None:
        for axis in (0, 1):
            outside |= (middle[axis] < 0) | (middle[axis] > anatomy.label_map.shape[axis] - 1)
    for axis, probability in ((0, 0.06), (1, 0.03), (2, 0.25)):
        size = outside.shape[axis]
        if rng.random() < probability:
            outside.narrow(axis, 0, int(rng.integers(1, size // 4))).fill_(True)
        if rng.random() < probability:
            cut = int(rng.integers(1, size // 4))
            outside.narrow(axis, size - cut, cut).fill_(True)
    return ~outside
