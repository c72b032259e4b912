"""What networks cost: parameters, floating-point operations, time and memory.

cost = alone(measure, name)     # in a fresh process, so that its peak of memory is its own
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from foundation import ClassSpec, ModelConfig, Preprocessing, TextSpec, UniversalModel
from foundation.evaluation import Figure
from foundation.inference import window_starts

GIB = 1 << 30
Result = TypeVar("Result")


def device_of(cpu: bool) -> torch.device:
    """Return the GPU where there is one, or the CPU if GPUs are to be left alone."""
    return torch.device("cpu" if cpu or not torch.cuda.is_available() else "cuda")


def universal_model(
    backbone: str,
    classes: Sequence[str],
    patch_size: Sequence[int],
    options: dict[str, Any] | None = None,
) -> UniversalModel:
    """Build a model of random weights and prompts, whose cost is that of a trained one.

    Args:
        backbone: A name of `BACKBONES`.
        classes: Of the model.
        patch_size: Voxels of a window.
        options: Arguments of the backbone.
    """
    x, y, z = patch_size
    config = ModelConfig(
        name=backbone,
        backbone=backbone,
        backbone_options=options or {},
        classes=tuple(ClassSpec(name) for name in classes),
        text=TextSpec(),
        preprocessing=Preprocessing(patch_size=(x, y, z)),
    )
    return UniversalModel(config, torch.randn(len(classes), config.text.dim))


def parameters(network: nn.Module) -> int:
    """Count the parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def flops(network: nn.Module, size: Sequence[int], channels: int = 1) -> int:
    """Count the operations of a forward pass, as torch's counter does: a multiply-add is two.

    The counter knows convolutions, matrix products and attention. It leaves out normalisations and
    activations. Nothing is computed: the network is moved to torch's "meta" device, and is of no
    use afterwards.

    Args:
        network: Takes an image (1, C, X, Y, Z).
        size: X, Y and Z.
        channels: C.
    """
    image = torch.empty(1, channels, *size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.to("meta").eval()(image)
    return int(counter.get_total_flops())


def windows(shape: Sequence[int], window: Sequence[int], overlap: float) -> int:
    """Count the sliding windows of a scan.

    Args:
        shape: Of the scan on the network's grid, in voxels.
        window: Of a window, in voxels.
        overlap: Share of a window that its neighbour covers.
    """
    pairs = zip(shape, window, strict=True)
    return prod(len(window_starts(size, side, overlap)) for size, side in pairs)


def seconds_of(call: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Measure how long a call takes, after one that is not counted.

    Args:
        call: What is measured.
        repeats: How often.
        device: What it computes on.
    """
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return found[1:]


def spread(name: str, values: Sequence[float], unit: str = "s") -> Figure:
    """Return the median of repeated measurements, with the smallest and the largest as its ends."""
    return Figure(name, statistics.median(values), unit, min(values), max(values), n=len(values))


class Memory:
    """The most memory that is needed from here on, beyond what is in use now.

    On a GPU it is what torch allocates there. On a CPU it is what the process holds, of which only
    Linux tells; the peak before counts too, so measure in a fresh process (`alone`).

    Args:
        device: What is computed on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: int | None = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.before = _status("VmRSS")

    def figure(self, name: str = "memory") -> Figure:
        """Return the peak as a figure, in GiB; without a value where the system does not tell."""
        if self.device.type == "cuda":
            return Figure(name, torch.cuda.max_memory_allocated(self.device) / GIB, "GiB")
        peak = _status("VmHWM")
        known = None if peak is None or self.before is None else (peak - self.before) / GIB
        return Figure(name, known, "GiB")


def _status(key: str) -> int | None:
    """What Linux tells of this process, in bytes."""
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith(f"{key}:")]
    return kib[0] << 10 if kib else None


def alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a fresh process; one of several that train together calls it itself.

    Args:
        function: Of a module.
        *arguments: That can be sent to another process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return function(*arguments)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
