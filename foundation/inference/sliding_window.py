"""Probabilities of a whole CT from overlapping windows, in memory that its length does not grow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from foundation import interrupt
from foundation.errors import UniversalCTError, UsageError, WeightsError
from foundation.imaging.preprocess import normalise_hu
from foundation.imaging.probabilities import NEGLIGIBLE, QUANTA, ProbabilityMap, crop, join
from foundation.networks.protocol import Network

SIGMA = 0.125  # of the Gaussian importance, in patch sizes; published (MONAI's default)
LEAST_IMPORTANCE = 1e-3  # MONAI's floor: corners of a single window still get a value


def window_size(shape: Sequence[int], patch_size: Sequence[int], divisor: int) -> tuple[int, ...]:
    """Choose the window for an image: the patch, or less along axes where the image is small.

    A multiple of the divisor and never only one divisor, since instance normalisation has no
    spread over a single bottleneck voxel.

    Args:
        shape: Of the image, in voxels.
        patch_size: Of the network, in voxels.
        divisor: Of the network: its input's sizes are multiples of it.
    """
    sizes = []
    for size, patch in zip(shape, patch_size, strict=True):
        count = max(2, ceil(min(size, patch) / divisor))
        sizes.append(count * divisor)
    return tuple(sizes)


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Place windows along an axis; the last one ends where the image ends.

    Args:
        size: Of the image, in voxels.
        window: Of a window, in voxels.
        overlap: Share of a window that its neighbour covers, in [0, 1).

    Returns:
        The first voxel of each window.
    """
    step = max(1, int(window * (1 - overlap)))
    count = ceil(max(size - window, 0) / step) + 1
    return [min(i * step, max(size - window, 0)) for i in range(count)]


def importance_map(window: Sequence[int]) -> Tensor:
    """Compute the Gaussian weight of each voxel of a window (x, y, z): the middle counts most."""
    weight = torch.ones(())
    for size in window:
        position = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        weight = weight[..., None] * torch.exp(-0.5 * (position / (SIGMA * size)) ** 2)
    return weight.clamp(min=LEAST_IMPORTANCE)


class SlabAccumulator:
    """Blends the logits of windows that arrive in the order of Z, and lets finished slices go.

    Holds maps × X × Y × (one window's Z) floats, however long the volume, and never a second array
    of that size: what can be done in place is.

    Args:
        maps: Channels of the logits.
        shape_xy: X and Y of the volume, in voxels.
        window: Size of a window, in voxels.
        device: Where the sums are kept.
        exclusive: Of a softmax, the classes that are wanted; None for sigmoids.
    """

    def __init__(
        self,
        maps: int,
        shape_xy: Sequence[int],
        window: Sequence[int],
        device: torch.device,
        exclusive: Sequence[int] | None = None,
    ) -> None:
        self.exclusive = exclusive
        self.total = torch.zeros((maps, *shape_xy, window[2]), device=device)
        self.weight = torch.zeros((*shape_xy, window[2]), device=device)
        self.importance = importance_map(window).to(device)
        self.window = tuple(window)
        self.z = 0

    def add(self, logits: Tensor, x: int, y: int) -> None:
        """Add the logits of one window, which begins at the slab's first slice.

        Args:
            logits: (K, x, y, z), of the window's size.
            x: Where the window begins, in voxels of the volume.
            y: The same along Y.
        """
        part = (slice(x, x + self.window[0]), slice(y, y + self.window[1]))
        weighted = logits.to(self.total.device, torch.float32) * self.importance
        self.total[(slice(None), *part)] += weighted
        self.weight[part] += self.importance

    def advance(self, z: int) -> Tensor:
        """Finish the slices that no further window covers, and let them go.

        Args:
            z: The first slice that stays.

        Returns:
            The classes' probabilities × 255, uint8 (K, X, Y, n), of the blended logits.

        Raises:
            WeightsError: A logit is not finite; as a probability it would be 0, or anything.
        """
        count = min(z - self.z, self.window[2])
        finished = self.total[..., :count].div_(self.weight[..., :count])
        # Here and not for each window: a voxel is looked at once and not eight times, and blending
        # keeps NaN and infinity. A sum is not finite if one of its terms is not.
        if not bool(finished.sum().isfinite()) and not bool(finished.isfinite().all()):
            raise WeightsError(
                "The network computed NaN or infinity, so its masks would be wrong. Its weights "
                "are damaged, or too large for the type of number that it computes in: load it "
                "again, with dtype float32."
            )
        if self.exclusive is not None:
            finished = lead_over_others(finished, self.exclusive)
        quantised = finished.sigmoid_().mul_(QUANTA).round_().to(torch.uint8)
        kept = self.window[2] - count
        for buffer in (*self.total, self.weight):
            buffer[..., :kept] = buffer[..., count:].clone()
            buffer[..., kept:] = 0
        self.z = z
        return quantised


def lead_over_others(scores: Tensor, channels: Sequence[int]) -> Tensor:
    """Return by how much classes of a softmax exceed the likeliest other channel.

    Its sigmoid exceeds 0.5 where the class is the likeliest. The class's own probability would
    leave a voxel of which three classes share most to background.

    Args:
        scores: (1 + K, …), background first.
        channels: The wanted classes, as indices.

    Returns:
        (k, …); negative where another channel is likelier.
    """
    best, second = scores.topk(2, dim=0).values
    wanted = scores[[channel + 1 for channel in channels]]
    return wanted - torch.where(wanted == best, second, best)


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
    """Run a network over a CT and iterate over finished slabs along the last axis.

    Around the volume lies air. Logits are blended, as published, and become probabilities once
    blended.

    Args:
        network: What is to be run; it is in evaluation mode and on `device`.
        hu: HU (X, Y, Z), at the spacing of the network and along its axes.
        channels: The wanted classes, as indices into the network's.
        device: Where to compute.
        overlap: Share of a window that its neighbour covers, in [0, 1).
        progress: Show a bar on standard error.

    Yields:
        (z, slab): slab (K, X, Y, n) holds probabilities × 255 of the slices from z on.

    Raises:
        UsageError: The network gives another number of channels than its configuration tells.
        WeightsError: The network gives values that are not finite, or cannot compute a window.
    """
    config = network.config
    settings = config.preprocessing
    exclusive = channels if config.activation == "softmax" else None
    maps = len(channels) if exclusive is None else 1 + len(config.classes)
    shape = hu.shape
    window = window_size(shape, settings.patch_size, config.divisor)
    image, before = _pad(hu, window, min(low for low, _ in settings.hu_windows))
    inside = [slice(skip, skip + size) for skip, size in zip(before, shape, strict=True)]
    starts = [window_starts(s, w, overlap) for s, w in zip(image.shape, window, strict=True)]
    nbytes = 4 * maps * image.shape[0] * image.shape[1] * window[2]
    place = _accumulator_device(device, nbytes)
    slab = SlabAccumulator(maps, image.shape[:2], window, place, exclusive)
    weights = next(network.parameters(), None)
    dtype = torch.float32 if weights is None else weights.dtype
    mixed = torch.autocast("cuda") if device.type == "cuda" else nullcontext()
    count = len(starts[0]) * len(starts[1]) * len(starts[2])
    hidden = None if progress else True  # None: hidden where no terminal shows it
    with tqdm(total=count, desc="segment", unit="window", disable=hidden) as bar:
        for index, z in enumerate(starts[2]):
            for x, y in product(starts[0], starts[1]):
                interrupt.check()
                patch = image[x : x + window[0], y : y + window[1], z : z + window[2]]
                normalised = normalise_hu(patch.to(device), settings)[None]
                with mixed:
                    logits = _computed(network, normalised.to(dtype), channels)
                _check_logits(network, logits, (1, maps, *window))
                slab.add(logits[0], x, y)
                bar.update()
            last = index + 1 == len(starts[2])
            finished = slab.advance(z + window[2] if last else starts[2][index + 1])
            # A volume padded along Z has a single slab, so `inside` fits every slab.
            yield z, finished[:, inside[0], inside[1], inside[2]].cpu().numpy()


def _computed(network: Network, image: Tensor, channels: Sequence[int]) -> Tensor:
    """The logits of a window; whatever layers of another's configuration raise, in a sentence."""
    try:
        return network(image, channels)
    except (UniversalCTError, torch.cuda.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise WeightsError(
            f"{network.config.name!r} cannot compute a window of {tuple(image.shape[2:])} voxels: "
            f"{error}. Memory ran out, or its configuration describes no network that works."
        ) from error


def _check_logits(network: Network, logits: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(logits.shape) != expected:
        config = network.config
        wanted = "background and all classes" if config.activation == "softmax" else "those asked"
        raise UsageError(
            f"{config.name!r} gave logits of shape {tuple(logits.shape)}, not {expected}. With "
            f"the activation {config.activation}, forward(image, channels) returns {wanted}."
        )


def collect(
    slabs: Iterable[tuple[int, NDArray[np.uint8]]], classes: int
) -> list[ProbabilityMap | None]:
    """Gather slabs into one cropped map a class.

    Args:
        slabs: From `slide`.
        classes: How many there are in each slab.

    Returns:
        The maps, on the grid that `slide` ran over; None where a class is nowhere above 0.05.
    """
    parts: list[list[ProbabilityMap]] = [[] for _ in range(classes)]
    for z, slab in slabs:
        for found, values in zip(parts, slab, strict=True):
            if values.max() >= NEGLIGIBLE * QUANTA:
                found.append(crop(values, (0, 0, z)))
    joined = []
    while parts:  # one class after the other, so that the pieces of all never lie beside the wholes
        found = parts.pop(0)
        joined.append(join(found) if found else None)
    return joined


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
