"""What a scanner makes of a body: table, metal, thick slices, point spread and noise.

The ranges are set wide on purpose, as in `render`: no single scanner or protocol is imitated.
"""

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
    """Scan a body: add the table, metal in some patients, thick slices, point spread and noise.

    Args:
        ct: HU (X, Y, Z), RAS; may be changed in place.
        spacing_mm: Isotropic.
        rng: The source of chance for single numbers.
        generator: The source of chance for fields.

    Returns:
        HU (X, Y, Z), within the 12 bits that a scanner stores: -1024 to 3071.
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
    # Most scans are clean, a few noisy. A larger voxel counts more photons: less noise.
    noise_hu = (3 + 27 * rng.random() ** 2) * (2.0 / spacing_mm) ** 0.5
    grain = torch.randn(ct.shape, generator=generator)
    if rng.random() < 0.5:  # smooth kernels leave noise that is correlated between neighbours
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
    # Beam hardening and photon starvation: a few lobes around the metal that fade with distance.
    streaks = torch.zeros_like(distance)
    for _ in range(6):
        streaks += torch.sin(int(rng.integers(1, 9)) * angle + rng.uniform(0, 6.3))
    streaks *= rng.uniform(20, 120) / (1 + distance / rng.uniform(20, 60))
    along = (z.abs() < length_mm).float()
    ct += streaks[..., None] * along * (ct > -900)  # the air around the body stays clear
    ct[(distance[..., None] < radius_mm) & (z.abs() < length_mm)] = 3000.0


def _thicken(ct: Tensor, slice_voxels: float) -> Tensor:
    """Average each voxel with its neighbours along Z, `slice_voxels` (above 1) in all."""
    reach = int(np.ceil((slice_voxels - 1) / 2))
    kernel = torch.ones(2 * reach + 1)
    kernel[0] = kernel[-1] = (slice_voxels - (2 * reach - 1)) / 2  # the fraction at both ends
    return _convolved(ct, kernel / kernel.sum(), axis=2)


def blur(ct: Tensor, sigma_voxels: float) -> Tensor:
    """Blur HU (X, Y, Z) by a Gaussian point spread, one axis after the other.

    Args:
        ct: HU (X, Y, Z).
        sigma_voxels: Standard deviation of the Gaussian.

    Returns:
        HU (X, Y, Z).
    """
    reach = int(np.ceil(2.5 * sigma_voxels))  # beyond it lies a hundredth of the weight
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma_voxels) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(3):
        ct = _convolved(ct, kernel, axis)
    return ct


def _convolved(ct: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """HU (X, Y, Z) convolved along an axis with a kernel of odd length; the edges continue."""
    shape, pad = [1] * 5, [0] * 6
    shape[2 + axis] = len(kernel)
    last_first = 2 * (2 - axis)
    pad[last_first : last_first + 2] = [len(kernel) // 2] * 2
    padded = functional.pad(ct[None, None], pad, mode="replicate")
    convolved: Tensor = functional.conv3d(padded, kernel.view(shape))
    return convolved[0, 0]
