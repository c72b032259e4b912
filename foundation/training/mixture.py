"""The numbered samples of a run: which source each comes from, and what is drawn from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foundation.errors import UsageError
from foundation.training.sample import PatchGrid, Sample
from foundation.training.sources.base import Source

if TYPE_CHECKING:
    from foundation.data.store.arrays import Store

_PREFETCHED = 4  # batches that each worker keeps ready
ECHO_APART = 64  # samples between one and its echo; each worker keeps its share of them in memory


class NumberedSample(Sample):
    """A sample with its source.

    Attributes:
        source: Index into `Mixture.names`.
    """

    source: int


class Mixture:
    """Draws sample number i of a run from (seed, i) alone.

    So a resumed run sees what the unbroken one saw, whatever the number of workers or processes.

    Args:
        sources: What samples are drawn from, by their weights.
        seed: Of the run.

    Raises:
        UsageError: No source has a weight above 0.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        weights = np.array([source.weight for source in sources], dtype=float)
        if not len(weights) or weights.sum() <= 0:
            raise UsageError("There is nothing to train on: no source has a weight above 0.")
        self.sources = list(sources)
        self.seed = seed
        self.share: NDArray[np.float64] = weights / weights.sum()

    @property
    def names(self) -> list[str]:
        """Names of the sources, which `NumberedSample.source` indexes."""
        return [source.name for source in self.sources]

    def sample(self, number: int, grid: PatchGrid) -> NumberedSample:
        """Draw sample `number` of the run on a grid."""
        rng = np.random.default_rng((self.seed, number))
        chosen = int(rng.choice(len(self.sources), p=self.share))
        drawn = self.sources[chosen].draw(rng, grid)
        return NumberedSample(**drawn, source=chosen)


def fingerprint(store: Store | None, mixture: Mixture) -> str:
    """Return a SHA-256 by which a resumed run knows that it sees the same data.

    Args:
        store: Of the run; None for a run without one.
        mixture: Of the run.

    Returns:
        64 hexadecimal digits.
    """
    cases = {} if store is None else store.manifest["cases"]
    known = {
        "cases": {key: [e.get("shape"), e.get("voxels")] for key, e in sorted(cases.items())},
        "sources": [(source.name, source.weight) for source in mixture.sources],
        "anatomies": [
            (anatomy.name, anatomy.label_map.shape, anatomy.weight)
            for source in mixture.sources
            for anatomy in getattr(source, "anatomies", ())
        ],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


class _Numbered(Dataset[NumberedSample]):
    """Samples by number; with echoes, the same one under several numbers."""

    def __init__(self, mixture: Mixture, grid: PatchGrid, echo: int = 1) -> None:
        self.mixture, self.grid, self.echo = mixture, grid, echo
        self._kept: dict[int, NumberedSample] = {}

    def __getitem__(self, number: int) -> NumberedSample:
        if self.echo == 1:
            return self.mixture.sample(number, self.grid)
        drawn = echoed(number, self.echo)
        if drawn not in self._kept:
            if self._kept and drawn // ECHO_APART != next(iter(self._kept)) // ECHO_APART:
                self._kept.clear()  # of the block before: it does not come again
            self._kept[drawn] = self.mixture.sample(drawn, self.grid)
        return self._kept[drawn]


def echoed(number: int, echo: int) -> int:
    """Return which sample is given under a number: blocks of ECHO_APART samples, several times.

    It depends on nothing else, so that a resumed run sees what the unbroken one saw.

    Args:
        number: 0 or above.
        echo: How often each sample is given.

    Returns:
        Number of the sample, for `Mixture.sample`.

    Reference:
        Data echoing, Choi et al., 2019 (arXiv 1907.05550).
    """
    block, place = divmod(number, ECHO_APART * echo)
    return block * ECHO_APART + place % ECHO_APART


def batch_numbers(
    first: int, batches: int, batch_size: int, rank: int, processes: int
) -> list[range]:
    """Number the samples of one process.

    All processes together take `processes * batch_size` consecutive numbers a batch, in the order
    of their rank: as one process would with the larger batch.

    Args:
        first: Number of the first sample of all processes.
        batches: How many.
        batch_size: Of one process.
        rank: Of this process.
        processes: How many there are.

    Returns:
        The numbers of each batch.
    """
    start = first + rank * batch_size
    step = processes * batch_size
    return [range(at, at + batch_size) for at in range(start, start + batches * step, step)]


@dataclass(frozen=True)
class Steps:
    """Some optimiser steps whose samples are of one kind.

    Attributes:
        count: How many steps.
        mixture: What their samples are drawn from.
        grid: Of their samples.
        batch_size: Samples of one batch of one process.
        accumulation: Batches of one step.
    """

    count: int
    mixture: Mixture
    grid: PatchGrid
    batch_size: int
    accumulation: int = 1


def batches(
    stages: Sequence[Steps],
    *,
    first_step: int,
    rank: int = 0,
    processes: int = 1,
    echo: int = 1,
    workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of one process from a step on, through all stages.

    Args:
        stages: One after the other. Their samples are numbered through.
        first_step: Optimiser step of the first batch.
        rank: Of this process.
        processes: How many there are.
        echo: How often each sample is given; see `echoed`.
        workers: Processes that make the batches beside the training; 0 makes them in this one.

    Yields:
        Collated `NumberedSample`s.
    """
    first_number, stage_start = 0, 0
    for stage in stages:
        a_batch = processes * stage.batch_size
        done = min(max(first_step - stage_start, 0), stage.count)
        numbers = batch_numbers(
            first_number + done * stage.accumulation * a_batch,
            (stage.count - done) * stage.accumulation,
            stage.batch_size,
            rank,
            processes,
        )
        if numbers:
            yield from _loader(_Numbered(stage.mixture, stage.grid, echo), numbers, workers)
        first_number += stage.count * stage.accumulation * a_batch
        stage_start += stage.count


def _loader(
    dataset: _Numbered, numbers: Sequence[range], workers: int
) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=numbers,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=_PREFETCHED if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Its own, or starting the workers would draw from the global one: on a resume at another
        # moment than in the unbroken run.
        generator=torch.Generator().manual_seed(0),
    )
