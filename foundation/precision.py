"""Where bfloat16 is fast and right: a network then takes half the time or less."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_FAULTY_VOXELS = 2


def computes_bfloat16(device: str | torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware.

    A CPU without such instructions can do it too, by a path that took 200 times as long.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Not before torch 2.6; other processors than x86 are not known to be fast.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return kind == "cpu" and supported is not None and bool(supported())


def trains_in_bfloat16(device: str | torch.device, coarsest: Sequence[int]) -> bool:
    """Whether a network's gradients can be had in bfloat16 on this device.

    coarsest: voxels along each axis of the coarsest grid. On a CPU (torch 2.14.1, AVX-512) the
    gradient of a 3×3×3 convolution's weights on 2×2×2 voxels is at random not a number; on 1 and on
    3 to 8 voxels it is right.
    """
    faulty = torch.device(device).type == "cpu" and min(coarsest) <= _FAULTY_VOXELS
    return computes_bfloat16(device) and not faulty


def autocast(device: str | torch.device, enabled: bool) -> torch.autocast:
    """A context that computes in bfloat16 if `enabled`, else in single precision."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)
