"""Where the batches of a tuning come from: patches through the network, or cached features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foundation.data.store.arrays import StoredCase
from foundation.errors import UsageError
from foundation.evaluation.scoring import mean_dice, validate
from foundation.hardware import autocast, trains_in_bfloat16
from foundation.imaging.frame import window_hu
from foundation.inference.sliding_window import window_starts
from foundation.model import UniversalModel
from foundation.networks.branches import Branch
from foundation.training.crops import read_crop
from foundation.training.logs import bar
from foundation.training.mixture import Mixture
from foundation.training.sample import PatchGrid, draw_truth
from foundation.training.trainer import Batch
from foundation.tuning.objective import Forward
from foundation.tuning.samples import FewScans, Patch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from foundation.tuning.methods.base import Method, TuningSettings
    from foundation.tuning.run import TuningRun

_WITHOUT_NEW = 0.25  # share of the cached windows that show no new class
_CACHE_OVERLAP = 0.25
_OF_CACHE = 1  # keeps the random numbers of the cache apart from those of the steps
_VALIDATION_OVERLAP = 0.25
_VALIDATION_WINDOWS = 12  # that are cached


class Feed(Protocol):
    """Gives the batches of a tuning, which depend on their numbers and the seed alone.

    Attributes:
        network: What a step computes with gradients: the model, or a part of it.
        classes: Those of the logits' channels.
        teacher: The old model, where it is asked.
    """

    network: nn.Module
    classes: tuple[str, ...]
    teacher: UniversalModel | None

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return samples of the run by their numbers, stacked, on the device."""

    def forward(
        self, network: Callable[..., Any], batch: Batch, accelerator: Accelerator
    ) -> Forward:
        """Return the network's logits of a batch, and what they should be."""

    def validate(self, rank: int, processes: int) -> dict[str, Tensor]:
        """Return sums over this process's share of the validation."""

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the Dice of each class to learn that was seen, from the sums of all processes."""


def runs_in_bfloat16(model: Any, size: Sequence[int], device: str | torch.device) -> bool:
    """Return whether patches of `size` voxels can be learnt from in bfloat16."""
    stride = model.backbone.strides[-1]
    return trains_in_bfloat16(device, [side // stride for side in size])


def _grid(model: Any, voxels: int) -> PatchGrid:
    pre = model.config.preprocessing
    return PatchGrid(pre.patch_size, pre.spacing_mm[0], pre.hu_windows, voxels, model.classes)


# --- patches --------------------------------------------------------------------------------------


class _AtVoxels(nn.Module):
    """A model that is asked for its logits at some voxels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, voxels: Tensor) -> Tensor:
        """image (B, C, X, Y, Z), voxels (B, M) flat indices → logits (B, K, M)."""
        logits: Tensor = self.model.logits_at(image, voxels)[0]
        return logits


class PatchFeed:
    """Patches of the training scans through the whole network.

    Args:
        settings: How many voxels a loss looks at.
        model: What is trained, on the device where it computes.
        scans: Drawn from, placed on the classes to learn.
        held_out: The scans to validate on.
        seed: Of the patches.
        teacher: The old model, asked about its classes at the same voxels; None for nobody.
    """

    def __init__(
        self,
        settings: TuningSettings,
        model: Any,  # text-driven or with a plain head: `logits_at` is all that is asked for
        scans: FewScans,
        held_out: Sequence[StoredCase],
        *,
        seed: int = 1,
        teacher: UniversalModel | None = None,
    ) -> None:
        self.model, self.device = model, model.device
        self.network: nn.Module = _AtVoxels(model)
        self.classes, self.learnt, self.held_out = model.classes, scans.new, tuple(held_out)
        self.mixture = Mixture([scans], seed)
        self.grid = _grid(model, settings.voxels)
        self.teacher = None if teacher is None else teacher.to(self.device).eval()

    def batch(self, numbers: Sequence[int]) -> Batch:
        """As `Feed.batch`."""
        samples = [self.mixture.sample(number, self.grid) for number in numbers]
        return {
            key: torch.stack([sample[key] for sample in samples]).to(self.device)
            for key in ("image", "voxels", "target", "annotated", "weight")
        }

    def forward(
        self, network: Callable[..., Any], batch: Batch, accelerator: Accelerator
    ) -> Forward:
        """As `Feed.forward`."""
        image, voxels = batch["image"], batch["voxels"]
        logits = network(image, voxels)
        taught = None
        if self.teacher is not None:
            with torch.no_grad(), accelerator.autocast():
                taught = self.teacher.logits_at(image, voxels)[0].float()
        return Forward(logits.float(), batch["target"], batch["annotated"], batch["weight"], taught)

    def validate(self, rank: int, processes: int) -> dict[str, Tensor]:
        """As `Feed.validate`: by the sliding window, without clean-up."""
        model, mine = self.model.eval(), self.held_out[rank::processes]
        fast = runs_in_bfloat16(model, self.grid.size, self.device)
        with autocast(self.device, fast):
            return {"dice": validate(model, mine, _VALIDATION_OVERLAP, self.learnt)}

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """As `Feed.scores`."""
        return mean_dice(sums["dice"], self.classes)[0]


# --- cached features ------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedWindow:
    """A window of a scan as the frozen network sees it.

    Attributes:
        full: Features (C, X, Y, Z) at the full size, in 16 bits.
        pyramid: Features of the encoder, finest first, in 16 bits; levels that no branch reads are
            tensors without channels.
        labels: Label values (X, Y, Z).
        known: bool (X, Y, Z), voxels that the loss may look at.
        case: The scan.
    """

    full: Tensor
    pyramid: tuple[Tensor, ...]
    labels: Tensor
    known: Tensor
    case: StoredCase


class _BranchAtVoxels(nn.Module):
    """The last branch of a model, over features that are known already."""

    def __init__(self, model: UniversalModel) -> None:
        super().__init__()
        self.model = model

    @property
    def branch(self) -> Branch:
        """The branch that learns."""
        branch = self.model.branches[-1]
        assert isinstance(branch, Branch)
        return branch

    @property
    def embedding(self) -> Tensor:
        """The prompts of its classes, (k, D)."""
        spec, rows = self.branch.spec, self.model.prompt_embedding
        if spec.replaces:
            return rows[[self.model.classes.index(name) for name in spec.classes]]
        return rows[-len(spec.classes) :]

    def forward(self, full: Tensor, pyramid: Sequence[Tensor], voxels: Tensor) -> Tensor:
        """full (B, C, X, Y, Z), pyramid, voxels (B, M) flat indices → logits (B, k, M)."""
        head, embedding = self.model.head, self.embedding
        logits: Tensor = self.branch(head, full, pyramid, embedding, voxels=voxels)
        return logits


class CachedFeed:
    """The last branch of a model over cached features: nothing else is computed in a step.

    Half of the windows are as inference will show them, half are turned, stretched and varied.

    Args:
        run: Its model, its scans and its seed.
        method: The settings.

    Raises:
        UsageError: No window of the training scans shows a new class.
    """

    def __init__(self, run: TuningRun, method: Method) -> None:
        self.reader = _BranchAtVoxels(run.model)
        self.network: nn.Module = self.reader
        self.classes = self.reader.branch.spec.classes
        self.teacher: UniversalModel | None = None
        self.model, self.device = run.model, run.model.device
        self.voxels, self.seed = method.voxels, run.seed
        self.fast = run.precision(method) == "bfloat16"
        plain = cache_windows(run, run.data.train, method.windows // 2)
        varied = cache_patches(run, method, method.windows - method.windows // 2)
        self.windows = [*plain, *varied]
        same = {case.key for case in run.data.validation} == {c.key for c in run.data.train}
        self.held_out = (
            plain if same else cache_windows(run, run.data.validation, _VALIDATION_WINDOWS)
        )
        showing = [
            [i for i, each in enumerate(self.windows) if shows(each, name)] for name in self.classes
        ]
        self.others = [
            i for i in range(len(self.windows)) if not any(i in found for found in showing)
        ]
        self.showing = [indices for indices in showing if indices]
        if not self.showing:
            raise UsageError("No training scan shows any of the new classes: nothing to learn.")

    def batch(self, numbers: Sequence[int]) -> Batch:
        """As `Feed.batch`; classes are drawn alike, and a window that shows the drawn one."""
        drawn = [self._sample(number) for number in numbers]
        batch: dict[str, Any] = {
            key: torch.stack([sample[key] for sample in drawn]).to(self.device)
            for key in ("voxels", "target", "annotated", "weight")
        }
        batch["full"], batch["pyramid"] = self._features([sample["window"] for sample in drawn])
        return batch

    def _sample(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, number))
        pool = self.showing[int(rng.integers(len(self.showing)))]
        if self.others and rng.random() < _WITHOUT_NEW:
            pool = self.others
        window = self.windows[pool[int(rng.integers(len(pool)))]]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        truth = draw_truth(
            window.labels,
            window.known,
            window.case.membership(self.classes),
            np.isin(self.classes, window.case.annotated),
            self.voxels,
            generator,
        )
        return {"window": window, **truth}

    def _features(self, windows: Sequence[CachedWindow]) -> tuple[Tensor, list[Tensor]]:
        """Features on the device, stacked; in bfloat16 where the network computes in it."""
        dtype = torch.bfloat16 if self.fast else torch.float32
        full = torch.stack([window.full for window in windows]).to(self.device, dtype)
        levels = zip(*(window.pyramid for window in windows), strict=True)
        return full, [torch.stack(level).to(self.device, dtype) for level in levels]

    def forward(
        self, network: Callable[..., Any], batch: Batch, accelerator: Accelerator
    ) -> Forward:
        """As `Feed.forward`."""
        logits = network(batch["full"], batch["pyramid"], batch["voxels"])
        return Forward(logits.float(), batch["target"], batch["annotated"], batch["weight"])

    @torch.no_grad()
    def validate(self, rank: int, processes: int) -> dict[str, Tensor]:
        """As `Feed.validate`: over windows of other scans, as one volume.

        A quick stand-in for segmenting the scans: windows overlap and are not blended.
        """
        sums = {
            key: torch.zeros(len(self.classes), dtype=torch.float64)
            for key in ("both", "either", "truth")
        }
        self.model.eval()
        for window in self.held_out[rank::processes]:
            full, pyramid = self._features([window])
            with autocast(self.device, self.fast):
                logits = self.reader.branch(self.model.head, full, pyramid, self.reader.embedding)[
                    0
                ]
            annotated = np.isin(self.classes, list(window.case.annotated))
            table = torch.from_numpy(window.case.membership(self.classes) & annotated)
            truth = table[window.labels.long()].movedim(-1, 0) & window.known
            found = (logits.cpu() > 0) & window.known
            found &= torch.from_numpy(annotated)[:, None, None, None]
            sums["both"] += 2 * (found & truth).sum((1, 2, 3))
            sums["either"] += found.sum((1, 2, 3)) + truth.sum((1, 2, 3))
            sums["truth"] += truth.sum((1, 2, 3))
        return sums

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """As `Feed.scores`."""
        both, either, truth = (sums[key].tolist() for key in ("both", "either", "truth"))
        return {name: both[i] / either[i] for i, name in enumerate(self.classes) if truth[i] > 0}


def shows(window: CachedWindow, name: str) -> bool:
    """Return whether a class is labelled in the window."""
    if name not in window.case.annotated:
        return False
    values = np.flatnonzero(window.case.membership([name])[:, 0])
    return bool(np.isin(window.labels.numpy(), values).any())


def cache_windows(run: TuningRun, cases: Sequence[StoredCase], most: int) -> list[CachedWindow]:
    """Return the features of up to `most` windows: those that show most of what is learnt.

    The windows are those of inference, so that a branch learns from what it will be given.
    """
    size = run.model.config.preprocessing.patch_size
    chosen = []
    for number, case in enumerate(cases):
        share = (most * (number + 1)) // len(cases) - (most * number) // len(cases)
        chosen += [(case, s) for s in choose_windows(case, size, run.learnt, max(1, share))]

    def windows() -> Iterator[Patch]:
        for case, start in chosen:
            image, values, inside = read_crop(case, start, size)
            known = inside & ~torch.isin(values, torch.tensor([*case.unknown]))
            yield Patch(case, image, values, known, (list(start), list(size)), None)

    return _cache(run, windows(), len(chosen))


def cache_patches(run: TuningRun, method: Method, count: int) -> list[CachedWindow]:
    """Return the features of random patches, turned, stretched and varied."""
    scans = FewScans(run.data.train, run.learnt)
    grid = _grid(run.model, method.voxels)

    def patches() -> Iterator[Patch]:
        for number in range(count):
            rng = np.random.default_rng((run.seed, _OF_CACHE, number))
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            yield scans.patch(rng, generator, grid)

    return _cache(run, patches(), count)


@torch.no_grad()  # not inference_mode: its tensors cannot take part in a step
def _cache(run: TuningRun, patches: Iterator[Patch], count: int) -> list[CachedWindow]:
    model, device = run.model.eval(), run.model.device
    branch = model.branches[-1]
    assert isinstance(branch, Branch)
    read = {len(model.backbone.strides) - 1, *(branch.side.levels if branch.side else ())}
    pre = model.config.preprocessing
    in_bfloat16 = runs_in_bfloat16(model, pre.patch_size, device)
    dtype = torch.bfloat16 if in_bfloat16 else torch.float16
    cached = []
    for patch in bar(
        patches, shown=run.shows_progress, desc="features", unit="window", total=count
    ):
        image = window_hu(patch.hu, pre.hu_windows)
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
    """Choose the windows of a scan that hold most of some classes, and some that hold none.

    Args:
        case: The scan.
        size: Voxels of a window along X, Y and Z.
        new: Names of the classes.
        most: How many windows, at most.

    Returns:
        The first voxel of each window.
    """
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
