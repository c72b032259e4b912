"""Where bfloat16 is fast: most of what a network computes then takes half the time or less."""

from __future__ import annotations

import torch


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


def autocast(device: str | torch.device) -> torch.autocast:
    """A context that computes in bfloat16 where that is fast, and in single precision elsewhere."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=computes_bfloat16(device))
