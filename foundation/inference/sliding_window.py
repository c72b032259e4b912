"""Probabilities of a whole CT from overlapping windows, in memory that its length does not grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from math import ceil
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from foundation.config import ModelConfig
from foundation.imaging.frame import window_hu
from foundation.imaging.probabilities import NEGLIGIBLE, QUANTA, ProbabilityMap, crop, join
from foundation.networks.backbones import Backbone
from foundation.networks.branches import read_out
from foundation.networks.head import TextDrivenHead

SIGMA = 0.125  # of the Gaussian importance, in patch sizes; published (MONAI's default)
LEAST_IMPORTANCE = 1e-3  # MONAI's floor: corners of a single window still get a value


class Network(Protocol):
    """What inference needs of a model; `UniversalModel` is one."""

    training: bool
    config: ModelConfig
    backbone: Backbone
    head: TextDrivenHead
    prompt_embedding: Tensor
    branches: nn.ModuleList

    def train(self, mode: bool = ...) -> Any:
        """Switch between training and evaluation."""

    def to(self, device: torch.device) -> Any:
        """Move to a device."""


def window_size(shape: Sequence[int], patch_size: Sequence[int], divisor: int) -> tuple[int, ...]:
    """The window for an image of `shape`: the patch, or less along axes where the image is small.

    A multiple of the divisor and never only one divisor, since instance normalisation has no
    spread over a single bottleneck voxel.
    """
    sizes = []
    for size, patch in zip(shape, patch_size, strict=True):
        count = max(2, ceil(min(size, patch) / divisor))
        sizes.append(count * divisor)
    return tuple(sizes)


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of windows along an axis; the last window ends where the image ends."""
    step = max(1, int(window * (1 - overlap)))
    count = ceil(max(size - window, 0) / step) + 1
    return [min(i * step, max(size - window, 0)) for i in range(count)]


def importance_map(window: Sequence[int]) -> Tensor:
    """Gaussian weight of each voxel of a window, float32, so that the middle counts most."""
    weight = torch.ones(())
    for size in window:
        position = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        weight = weight[..., None] * torch.exp(-0.5 * (position / (SIGMA * size)) ** 2)
    return weight.clamp(min=LEAST_IMPORTANCE)


class SlabAccumulator:
    """Blends the logits of windows that arrive in the order of Z, and lets finished slices go.

    Holds classes × X × Y × (one window's Z) floats, however long the volume, and never a second
    array of that size: what can be done in place is.
    """

    def __init__(
        self, classes: int, shape_xy: Sequence[int], window: Sequence[int], device: torch.device
    ) -> None:
        self.total = torch.zeros((classes, *shape_xy, window[2]), device=device)
        self.weight = torch.zeros((*shape_xy, window[2]), device=device)
        self.importance = importance_map(window).to(device)
        self.window = tuple(window)
        self.z = 0

    def add(self, logits: Tensor, x: int, y: int) -> None:
        """Add one window's logits (K, x, y, z), whose first slice is the slab's."""
        part = (slice(x, x + self.window[0]), slice(y, y + self.window[1]))
        weighted = logits.to(self.total.device, torch.float32) * self.importance
        self.total[(slice(None), *part)] += weighted
        self.weight[part] += self.importance

    def advance(self, z: int) -> Tensor:
        """Finish the slices before `z`, which no further window covers, and let them go.

        Returns their probabilities × 255 (K, X, Y, n), uint8: the sigmoid of the blended logits.
        """
        count = min(z - self.z, self.window[2])
        finished = self.total[..., :count].div_(self.weight[..., :count])
        quantised = finished.sigmoid_().mul_(QUANTA).round_().to(torch.uint8)
        kept = self.window[2] - count
        for buffer in (*self.total, self.weight):
            buffer[..., :kept] = buffer[..., count:].clone()
            buffer[..., kept:] = 0
        self.z = z
        return quantised


@torch.inference_mode()
def slide(
    network: Network,
    hu: NDArray[np.float32],
    channels: Sequence[int],
    *,
    device: torch.device,
    overlap: float,
    progress: bool,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Run the network over `hu` (X, Y, Z) on its own grid and yield finished slabs along Z.

    channels: the classes to compute, as indices into the network's. Around the volume lies air.
    Features are computed once a window, whatever the number of classes. Logits are blended, as
    published, and become probabilities once blended.

    Yields (z, slab): slab (K, X, Y, n) holds probabilities × 255 of the slices from z on.
    """
    settings = network.config.preprocessing
    shape = hu.shape
    window = window_size(shape, settings.patch_size, network.backbone.divisor)
    image, before = _pad(hu, window, min(low for low, _ in settings.hu_windows))
    inside = [slice(skip, skip + size) for skip, size in zip(before, shape, strict=True)]
    starts = [window_starts(s, w, overlap) for s, w in zip(image.shape, window, strict=True)]
    nbytes = 4 * len(channels) * image.shape[0] * image.shape[1] * window[2]
    slab = SlabAccumulator(
        len(channels), image.shape[:2], window, _accumulator_device(device, nbytes)
    )
    count = len(starts[0]) * len(starts[1]) * len(starts[2])
    hidden = None if progress else True  # None: hidden where no terminal shows it
    with tqdm(total=count, desc="segment", unit="window", disable=hidden) as bar:
        for index, z in enumerate(starts[2]):
            for x, y in product(starts[0], starts[1]):
                patch = image[x : x + window[0], y : y + window[1], z : z + window[2]]
                windowed = window_hu(patch.to(device), settings.hu_windows)[None]
                slab.add(_logits(network, windowed, channels, device)[0], x, y)
                bar.update()
            last = index + 1 == len(starts[2])
            finished = slab.advance(z + window[2] if last else starts[2][index + 1])
            # A volume padded along Z has a single slab, so `inside` fits every slab.
            yield z, finished[:, inside[0], inside[1], inside[2]].cpu().numpy()


def collect(
    slabs: Iterator[tuple[int, NDArray[np.uint8]]], classes: int, offset: Sequence[int]
) -> list[ProbabilityMap | None]:
    """Gather slabs into one cropped map a class; None where a class is nowhere above 0.05.

    offset: where the slabs' first voxel lies in the network's grid.
    """
    parts: list[list[ProbabilityMap]] = [[] for _ in range(classes)]
    for z, slab in slabs:
        for found, values in zip(parts, slab, strict=True):
            if values.max() >= NEGLIGIBLE * QUANTA:
                found.append(crop(values, (offset[0], offset[1], offset[2] + z)))
    joined = []
    while parts:  # one class after the other, so that the pieces of all never lie beside the wholes
        found = parts.pop(0)
        joined.append(join(found) if found else None)
    return joined


def _logits(
    network: Network, image: Tensor, channels: Sequence[int], device: torch.device
) -> Tensor:
    mixed = torch.autocast("cuda") if device.type == "cuda" else nullcontext()
    with mixed:
        pyramid = network.backbone.encode(image.to(network.prompt_embedding.dtype))
        return read_out(network, network.backbone.decode(pyramid), pyramid, channels)


def _pad(
    hu: NDArray[np.float32], window: Sequence[int], air_hu: float
) -> tuple[Tensor, tuple[int, ...]]:
    """The image with air around it, as large as the window at least, and the voxels put before."""
    missing = [max(0, size - have) for size, have in zip(window, hu.shape, strict=True)]
    before = tuple(count // 2 for count in missing)
    if any(missing):
        around = [(first, count - first) for first, count in zip(before, missing, strict=True)]
        hu = np.pad(hu, around, constant_values=air_hu)
    return torch.from_numpy(np.ascontiguousarray(hu)), before


def _accumulator_device(device: torch.device, nbytes: int) -> torch.device:
    """On the GPU where there is ample room, in main memory otherwise."""
    if device.type == "cuda" and nbytes < torch.cuda.mem_get_info(device)[0] // 4:
        return device
    return torch.device("cpu")
