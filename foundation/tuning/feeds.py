"""Where the batches of a tuning come from: patches through the network, or cached features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from foundation.data.store.arrays import StoredCase
from foundation.errors import UsageError
from foundation.hardware import autocast, trains_in_bfloat16
from foundation.imaging.frame import window_hu
from foundation.inference.sliding_window import window_starts
from foundation.model import UniversalModel
from foundation.networks.branches import Branch
from foundation.training.crops import read_crop
from foundation.training.mixture import Mixture
from foundation.training.sample import PatchGrid, draw_truth
from foundation.tuning.objective import Forward
from foundation.tuning.samples import FewScans, Patch

_WITHOUT_NEW = 0.25  # share of the cached windows that show no new class
_CACHE_OVERLAP = 0.25
_OF_CACHE = 1  # tells the chance of the cache from that of the steps


class Feed(Protocol):
    """Gives the forward pass of step `step`, which depends on the step and the seed alone."""

    def __call__(self, step: int) -> Forward:
        """The network's logits of this step's batch, with gradients, and what they should be."""


@dataclass
class PatchFeed:
    """Patches of a mixture through the whole network.

    teacher: the old model, asked about its classes at the same voxels; None for nobody.
    """

    model: UniversalModel
    mixture: Mixture
    grid: PatchGrid
    batch_size: int
    teacher: UniversalModel | None
    device: torch.device

    def __call__(self, step: int) -> Forward:
        """As `Feed`."""
        first = step * self.batch_size
        samples = [self.mixture.sample(first + i, self.grid) for i in range(self.batch_size)]
        batch = {
            key: torch.stack([sample[key] for sample in samples]).to(self.device)
            for key in ("image", "voxels", "target", "annotated", "weight")
        }
        taught = None
        with autocast(self.device, fast(self.model, self.grid.size, self.device)):
            logits, _ = self.model.logits_at(batch["image"], batch["voxels"])
            if self.teacher is not None:
                with torch.no_grad():
                    taught, _ = self.teacher.logits_at(batch["image"], batch["voxels"])
                    taught = taught.float()
        logits = logits.float()
        return Forward(logits, batch["target"], batch["annotated"], batch["weight"], taught)


@dataclass(frozen=True)
class CachedWindow:
    """A window of a scan as the frozen network sees it.

    full (C, X, Y, Z), pyramid: features in 16 bits; levels that no branch reads are left out as
    tensors without channels. labels (X, Y, Z): label values. known (X, Y, Z) bool: voxels that the
    loss may look at. case: whose it is.
    """

    full: Tensor
    pyramid: tuple[Tensor, ...]
    labels: Tensor
    known: Tensor
    case: StoredCase


class CachedFeed:
    """The last branch of a model over cached features: nothing else is computed in a step.

    Raises:
        UsageError: no window of these cases shows a new class.
    """

    def __init__(
        self,
        model: UniversalModel,
        windows: Sequence[CachedWindow],
        new: Sequence[str],
        voxels: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.model, self.windows, self.new = model, windows, tuple(new)
        self.voxels, self.seed, self.device = voxels, seed, device
        self.fast = fast(model, model.config.preprocessing.patch_size, device)
        self.showing = [
            [i for i, each in enumerate(windows) if shows(each, name)] for name in self.new
        ]
        self.others = [i for i in range(len(windows)) if not any(i in s for s in self.showing)]
        self.showing = [indices for indices in self.showing if indices]
        if not self.showing:
            raise UsageError("No training scan shows any of the new classes: nothing to learn.")

    def __call__(self, step: int) -> Forward:
        """As `Feed`; classes are drawn alike, and a window that shows the drawn one."""
        rng = np.random.default_rng((self.seed, step))
        pool = self.showing[int(rng.integers(len(self.showing)))]
        if self.others and rng.random() < _WITHOUT_NEW:
            pool = self.others
        window = self.windows[pool[int(rng.integers(len(pool)))]]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        truth = draw_truth(
            window.labels,
            window.known,
            window.case.membership(self.new),
            np.isin(self.new, window.case.annotated),
            self.voxels,
            generator,
        )
        logits = self._logits(window, truth["voxels"])
        return Forward(
            logits,
            truth["target"][None].to(self.device),
            truth["annotated"][None].to(self.device),
            truth["weight"][None].to(self.device),
        )

    def _logits(self, window: CachedWindow, voxels: Tensor) -> Tensor:
        full, pyramid = _whole(window, self.device, self.fast)
        embedding = self.model.prompt_embedding[-len(self.new) :]
        branch = self.model.branches[-1]
        assert isinstance(branch, Branch)
        with autocast(self.device, self.fast):
            logits = branch.logits_at(
                self.model.head, full, pyramid, embedding, voxels[None].to(self.device)
            )
        return logits.float()

    @torch.no_grad()
    def dice(self, windows: Sequence[CachedWindow]) -> dict[str, float]:
        """Dice of each new class over windows of other scans, as one volume; absent ones left out.

        A quick stand-in for segmenting the scans: windows overlap and are not blended.
        """
        embedding = self.model.prompt_embedding[-len(self.new) :]
        counts = np.zeros((2, len(self.new)))
        reference = np.zeros(len(self.new))
        for window in windows:
            full, pyramid = _whole(window, self.device, self.fast)
            with autocast(self.device, self.fast):
                logits = self.model.branches[-1](self.model.head, full, pyramid, embedding)[0]
            logits = logits.cpu()
            annotated = np.isin(self.new, list(window.case.annotated))
            table = torch.from_numpy(window.case.membership(self.new) & annotated)
            truth = table[window.labels.long()].movedim(-1, 0) & window.known
            said = (logits > 0) & window.known & torch.from_numpy(annotated)[:, None, None, None]
            counts[0] += 2 * (said & truth).sum((1, 2, 3)).numpy()
            counts[1] += (said.sum((1, 2, 3)) + truth.sum((1, 2, 3))).numpy()
            reference += truth.sum((1, 2, 3)).numpy()
        return {
            name: float(counts[0, i] / counts[1, i])
            for i, name in enumerate(self.new)
            if reference[i] > 0
        }


def fast(model: UniversalModel, size: Sequence[int], device: torch.device) -> bool:
    """Whether patches of `size` voxels can be learnt from in bfloat16."""
    stride = model.backbone.strides[-1]
    return trains_in_bfloat16(device, [side // stride for side in size])


def _whole(window: CachedWindow, device: torch.device, fast: bool) -> tuple[Tensor, list[Tensor]]:
    """Features on the device, as a batch of one; in bfloat16 if `fast`."""
    dtype = torch.bfloat16 if fast else torch.float32
    full = window.full[None].to(device, dtype)
    return full, [level[None].to(device, dtype) for level in window.pyramid]


def shows(window: CachedWindow, name: str) -> bool:
    """Whether a class is labelled in the window."""
    if name not in window.case.annotated:
        return False
    values = np.flatnonzero(window.case.membership([name])[:, 0])
    return bool(np.isin(window.labels.numpy(), values).any())


def cache_windows(
    model: UniversalModel,
    cases: Sequence[StoredCase],
    new: Sequence[str],
    most: int,
    device: torch.device,
    progress: bool = True,
) -> list[CachedWindow]:
    """Features of up to `most` windows of the scans: those that show most of the new classes.

    The windows are those of inference, so that a branch learns from what it will be given.
    """
    size = model.config.preprocessing.patch_size
    chosen = []
    for number, case in enumerate(cases):
        share = (most * (number + 1)) // len(cases) - (most * number) // len(cases)
        chosen += [(case, start) for start in choose_windows(case, size, new, max(1, share))]

    def windows() -> Iterator[Patch]:
        for case, start in chosen:
            image, values, inside = read_crop(case, start, size)
            known = inside & ~torch.isin(values, torch.tensor([*case.unknown]))
            yield Patch(case, image, values, known, (list(start), list(size)), None)

    return _cache(model, windows(), len(chosen), device, progress)


def cache_patches(
    model: UniversalModel,
    scans: FewScans,
    grid: PatchGrid,
    count: int,
    seed: int,
    device: torch.device,
    progress: bool = True,
) -> list[CachedWindow]:
    """Features of random patches of the scans, turned, stretched and varied as `scans` says."""

    def patches() -> Iterator[Patch]:
        for number in range(count):
            rng = np.random.default_rng((seed, _OF_CACHE, number))
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            yield scans.patch(rng, generator, grid)

    return _cache(model, patches(), count, device, progress)


@torch.no_grad()  # not inference_mode: its tensors cannot take part in a step
def _cache(
    model: UniversalModel,
    patches: Iterator[Patch],
    count: int,
    device: torch.device,
    progress: bool,
) -> list[CachedWindow]:
    model.eval()
    branch = model.branches[-1]
    assert isinstance(branch, Branch)
    read = {len(model.backbone.strides) - 1, *(branch.side.levels if branch.side else ())}
    in_bfloat16 = fast(model, model.config.preprocessing.patch_size, device)
    dtype = torch.bfloat16 if in_bfloat16 else torch.float16
    cached = []
    for patch in tqdm(patches, desc="features", unit="window", total=count, disable=not progress):
        image = window_hu(patch.hu, model.config.preprocessing.hu_windows)
        with autocast(device, in_bfloat16):
            pyramid = model.backbone.encode(image[None].to(device))
            full = model.backbone.decode(pyramid)
        kept = (f[0] if level in read else f[0, :0] for level, f in enumerate(pyramid))
        cached.append(
            CachedWindow(
                full[0].to("cpu", dtype),
                tuple(level.to("cpu", dtype) for level in kept),
                patch.labels,
                patch.known,
                patch.case,
            )
        )
    return cached


def choose_windows(
    case: StoredCase, size: Sequence[int], new: Sequence[str], most: int
) -> list[tuple[int, int, int]]:
    """First voxels of the windows that hold most of the new classes, and of some that hold none."""
    labels = case.read_labels()
    table: NDArray[np.bool_] = np.asarray(case.membership(new).any(1))
    starts = list(
        product(
            *(window_starts(n, w, _CACHE_OVERLAP) for n, w in zip(case.shape, size, strict=True))
        )
    )
    found: NDArray[np.int64] = np.array(
        [
            table[labels[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]].sum()
            for start in starts
        ]
    )
    order = np.argsort(-found, kind="stable")
    showing = [int(i) for i in order if found[i] > 0]
    empty = [int(i) for i in order if found[i] == 0]
    without = min(len(empty), round(most * _WITHOUT_NEW), max(0, most - 1))
    picked = showing[: most - without]
    # Evenly over the scan, not the first corner of it.
    step = max(1, len(empty) // without) if without else 1
    picked += empty[::step][:without]
    return [(starts[i][0], starts[i][1], starts[i][2]) for i in picked]
