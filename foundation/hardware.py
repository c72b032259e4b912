"""Memory that is kept between training steps, and where bfloat16 is fast and right."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

# Numbers of mallopt's parameters in glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_FAULTY_VOXELS = 2


def keep_freed_memory(spare_bytes: int = 1 << 28) -> bool:
    """Keep freed memory in the process for the next allocation; halves a training step on a CPU.

    By default glibc takes every large tensor fresh from the system and gives it back, and the
    system clears its pages each time. A network that allocates the same tensors in every step
    then spends its time on page faults. The whole process is affected, and holds on to the most
    that it ever needed.

    Args:
        spare_bytes: By how much the heap grows at a time.

    Returns:
        Whether it works here: only with glibc, hence on Linux.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, spare_bytes))
    return all([mallopt(name, value) == 1 for name, value in settings])


def computes_bfloat16(device: str | torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 in hardware.

    A CPU without such instructions can do it too, by a path that took 200 times as long.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Not before torch 2.6; other processors than x86 are not known to be fast.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return kind == "cpu" and supported is not None and bool(supported())


def trains_in_bfloat16(device: str | torch.device, coarsest: Sequence[int]) -> bool:
    """Tell whether a network's gradients are right in bfloat16 on this device.

    On a CPU (torch 2.14.1, AVX-512) the gradient of a 3×3×3 convolution's weights on 2×2×2 voxels
    is at random not a number. On 1 voxel and on 3 to 8 voxels it is right.

    Args:
        device: Where the network is trained.
        coarsest: Voxels along each axis of the network's coarsest grid.
    """
    faulty = torch.device(device).type == "cpu" and min(coarsest) <= _FAULTY_VOXELS
    return computes_bfloat16(device) and not faulty


def autocast(device: str | torch.device, enabled: bool) -> torch.autocast:
    """A context that computes in bfloat16 if `enabled`, else in single precision."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)
