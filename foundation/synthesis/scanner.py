"""What a scanner makes of a body: table, metal, thick slices, point spread and noise."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from foundation.synthesis.fields import smooth_noise

AIR_HU = -1000.0


def scan(
    ct: Tensor, spacing_mm: float, rng: np.random.Generator, generator: torch.Generator
) -> Tensor:
    """A scan (X, Y, Z) in HU of a body (X, Y, Z; RAS) in HU, which may be changed in place.

    spacing_mm: isotropic. The scanner's table, its point spread and noise, and the range of its
    numbers; metal in some patients.
    """
    if rng.random() < 0.4:
        _lay_on_table(ct, spacing_mm, rng)
    if rng.random() < 0.08:
        _add_implant(ct, spacing_mm, rng)
    slice_voxels = rng.uniform(1, 7) / spacing_mm
    if slice_voxels > 1.2 and rng.random() < 0.5:
        ct = _thicken(ct, slice_voxels)
    # Labels meet at sharp voxel edges; no scanner draws those, so there is always some blur.
    sigma_voxels = max(rng.uniform(0.3, 2.2) / spacing_mm, rng.uniform(0.35, 0.6))
    if sigma_voxels > 0.25:
        ct = blur(ct, sigma_voxels)
    noise_hu = (3 + 27 * rng.random() ** 2) * (2.0 / spacing_mm) ** 0.5
    grain = torch.randn(ct.shape, generator=generator)
    if rng.random() < 0.5:
        grain = 0.5 * grain + smooth_noise(tuple(ct.shape), 1.7, generator)
    scanned: Tensor = (ct + noise_hu * grain).clamp_(-1024, 3071)
    return scanned


def _lay_on_table(ct: Tensor, spacing_mm: float, rng: np.random.Generator) -> None:
    """Draw a table in the air behind the body (towards -Y), in place.

    A slab, or the thin shells of a curved one with foam between them.
    """
    body = (ct > -500).any(2).any(0).nonzero()
    if not len(body):
        return
    back_mm = float(body.min()) * spacing_mm - rng.uniform(0, 25)
    x_mm = (torch.arange(ct.shape[0]) - ct.shape[0] / 2) * spacing_mm + rng.uniform(-60, 60)
    y_mm = torch.arange(ct.shape[1]) * spacing_mm
    curvature = rng.uniform(0, 1 / 500) if rng.random() < 0.7 else 0.0
    depth_mm = back_mm + curvature * x_mm[:, None].square() - y_mm[None]  # below the surface
    thickness_mm = rng.uniform(5, 70)
    foam = rng.uniform(-1000, -850) if rng.random() < 0.6 else rng.uniform(-700, 200)
    table = torch.full(depth_mm.shape, AIR_HU)
    table[(depth_mm > 0) & (depth_mm < thickness_mm)] = foam
    shell_mm = max(rng.uniform(1, 5), 0.7 * spacing_mm)
    shell = (depth_mm.abs() < shell_mm / 2) | ((depth_mm - thickness_mm).abs() < shell_mm / 2)
    table[shell] = rng.uniform(-800, 300)
    in_air = ct < -800
    ct.copy_(torch.where(in_air, torch.maximum(ct, table[..., None]), ct))


def _add_implant(ct: Tensor, spacing_mm: float, rng: np.random.Generator) -> None:
    """A piece of metal in a bone, with its bright and dark streaks in the axial plane, in place."""
    bone = (ct > 300).nonzero()
    if not len(bone):
        return
    place = bone[int(rng.integers(len(bone)))]
    x, y, z = (
        (torch.arange(size) - int(at)) * spacing_mm
        for size, at in zip(ct.shape, place, strict=True)
    )
    radius_mm, length_mm = rng.uniform(3, 14), rng.uniform(10, 50)
    distance = (x[:, None].square() + y[None].square()).sqrt()
    angle = torch.atan2(y[None].expand_as(distance), x[:, None].expand_as(distance))
    streaks = torch.zeros_like(distance)
    for _ in range(6):
        streaks += torch.sin(int(rng.integers(1, 9)) * angle + rng.uniform(0, 6.3))
    streaks *= rng.uniform(20, 120) / (1 + distance / rng.uniform(20, 60))
    along = (z.abs() < length_mm).float()
    ct += streaks[..., None] * along * (ct > -900)
    ct[(distance[..., None] < radius_mm) & (z.abs() < length_mm)] = 3000.0


def _thicken(ct: Tensor, slice_voxels: float) -> Tensor:
    """A thick slice: the mean of `slice_voxels` (above 1) neighbours along Z."""
    reach = int(np.ceil((slice_voxels - 1) / 2))
    kernel = torch.ones(2 * reach + 1)
    kernel[0] = kernel[-1] = (slice_voxels - (2 * reach - 1)) / 2
    padded = functional.pad(ct[None, None], (reach, reach, 0, 0, 0, 0), mode="replicate")
    thick: Tensor = functional.conv3d(padded, (kernel / kernel.sum()).view(1, 1, 1, 1, -1))
    return thick[0, 0]


def blur(ct: Tensor, sigma_voxels: float) -> Tensor:
    """Gaussian point spread, one axis after the other."""
    reach = int(np.ceil(2.5 * sigma_voxels))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma_voxels) ** 2)
    kernel = kernel / kernel.sum()
    blurred = ct[None, None]
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = len(kernel)
        pad = [0, 0, 0, 0, 0, 0]
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = reach  # the last axis comes first
        padded = functional.pad(blurred, pad, mode="replicate")
        blurred = functional.conv3d(padded, kernel.view(shape))
    return blurred[0, 0]
