"""The numbered samples of a run: which source each comes from, and what is drawn from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from foundation.errors import UsageError
from foundation.pretraining.config import (
    PhantomsConfig,
    RunConfig,
    ScansConfig,
    Size,
    StageConfig,
    SynthesisConfig,
    Window,
)
from foundation.synthesis.anatomy import INDEX, Anatomy, load_anatomies, phantom_anatomy
from foundation.synthesis.patch import PatchSettings, Sample, draw_patch
from foundation.taxonomy import NAMES
from foundation.training.scans import scan_sources

if TYPE_CHECKING:
    from foundation.data.store.arrays import Store

_PREFETCHED = 4  # batches that each worker keeps ready
ECHO_APART = 64  # samples between one and its echo; each worker keeps its share of them in memory


@dataclass(frozen=True)
class PatchGrid:
    """What a source is asked for.

    size: voxels along X Y Z, at `spacing_mm` isotropic. voxels: how many of them the loss looks
    at; None for all. classes: names, in the order of the target's channels.
    """

    size: Size
    spacing_mm: float
    hu_windows: tuple[Window, ...]
    voxels: int | None
    classes: tuple[str, ...]


class Source(Protocol):
    """Something that samples are drawn from.

    name: for the log. weight: how often it is drawn, relative to the others.
    """

    name: str
    weight: float

    def draw(self, rng: np.random.Generator, grid: PatchGrid) -> Sample:
        """One random sample; `rng` is the only source of chance."""


class NumberedSample(Sample):
    """A sample that remembers its source: index into `Mixture.names`."""

    source: int


@dataclass
class Rendered:
    """Label maps, rendered by the sampler; those with a scan are cut out of it."""

    name: str
    weight: float
    anatomies: Sequence[Anatomy]

    def draw(self, rng: np.random.Generator, grid: PatchGrid) -> Sample:
        """As `Source.draw`."""
        weights = np.array([anatomy.weight for anatomy in self.anatomies])
        chosen = int(rng.choice(len(self.anatomies), p=weights / weights.sum()))
        return _draw_rendered(self.anatomies[chosen], rng, grid)


class Phantoms:
    """Generated bodies. Each is made where it is first needed: in the process of a worker."""

    def __init__(self, name: str, weight: float, count: int, seed: int) -> None:
        self.name, self.weight, self.count, self.seed = name, weight, count, seed
        self._made: dict[int, Anatomy] = {}

    def draw(self, rng: np.random.Generator, grid: PatchGrid) -> Sample:
        """As `Source.draw`."""
        chosen = int(rng.integers(self.count))
        if chosen not in self._made:
            self._made[chosen] = phantom_anatomy(self.seed * 1000 + chosen)
        return _draw_rendered(self._made[chosen], rng, grid)


def _draw_rendered(anatomy: Anatomy, rng: np.random.Generator, grid: PatchGrid) -> Sample:
    voxels = int(np.prod(grid.size)) if grid.voxels is None else grid.voxels
    settings = PatchSettings(
        patch_size=grid.size[0],
        spacing_mm=grid.spacing_mm,
        hu_windows=grid.hu_windows,
        voxels=voxels,
    )
    return _for_classes(draw_patch(anatomy, settings, rng), grid.classes)


def _for_classes(sample: Sample, classes: Sequence[str]) -> Sample:
    """The taxonomy's channels in the order of `classes`; what it does not have is not annotated."""
    if tuple(classes) == NAMES:
        return sample
    rows = [INDEX.get(name, -1) for name in classes]
    known = torch.tensor([row >= 0 for row in rows])
    chosen = torch.tensor(rows).clamp_min(0)
    sample["target"] = sample["target"][chosen] & known[:, None]
    sample["annotated"] = sample["annotated"][chosen] & known
    return sample


class Mixture:
    """Draws sample number i of a run from (seed, i) alone.

    So a resumed run sees what the unbroken one saw, whatever the number of workers or processes.
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
        """Sample `number` of the run."""
        rng = np.random.default_rng((self.seed, number))
        chosen = int(rng.choice(len(self.sources), p=self.share))
        drawn = self.sources[chosen].draw(rng, grid)
        return NumberedSample(**drawn, source=chosen)


def build_sources(config: RunConfig, store: Store | None, held_out: frozenset[str]) -> list[Source]:
    """The sources of a run; a scans entry becomes one source a dataset.

    held_out: keys of cases that are not trained on.

    Raises:
        UsageError: there is no store where a source needs one, or nothing is in it.
    """
    sources: list[Source] = []
    for entry in config.sources:
        if isinstance(entry, PhantomsConfig):
            sources.append(Phantoms("phantoms", entry.weight, entry.count, config.seed))
        elif store is None:
            raise UsageError(
                f"A source of {entry.kind} needs --store, made by `universal-ct prepare`."
            )
        elif isinstance(entry, ScansConfig):
            sources += scan_sources(entry, store, held_out)
        elif isinstance(entry, SynthesisConfig):
            anatomies = load_anatomies(store, entry.datasets, held_out)
            sources.append(Rendered("synthesis", entry.weight, anatomies))
    return [source for source in sources if source.weight > 0]


def open_store(config: RunConfig) -> Store | None:
    """The store that a run names, if it names one.

    Raises:
        MissingExtraError: blosc2 is not installed.
        UsageError: the folder holds no store.
    """
    if config.store is None:
        return None
    from foundation.data.store.arrays import Store

    return Store(config.store)


def fingerprint(store: Store | None, mixture: Mixture) -> str:
    """SHA-256 of what says which data there are: a resumed run must see the same."""
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
    """Which sample is given under a number: blocks of ECHO_APART samples, each `echo` times over.

    It depends on nothing else, so that a resumed run sees what the unbroken one saw. Reference:
    data echoing, Choi et al., 2019 (arXiv 1907.05550).
    """
    block, place = divmod(number, ECHO_APART * echo)
    return block * ECHO_APART + place % ECHO_APART


class BatchNumbers(Sampler[list[int]]):
    """Numbers of the samples of one process, a list a batch.

    All processes together take `processes * batch_size` consecutive numbers a batch, in the order
    of their rank: as one process would with the larger batch.
    """

    def __init__(self, first: int, batches: int, batch_size: int, rank: int, processes: int):
        self.first, self.batches, self.batch_size = first, batches, batch_size
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.batches):
            start = (batch * self.processes + self.rank) * self.batch_size + self.first
            yield list(range(start, start + self.batch_size))


def grid_of(config: RunConfig, stage: StageConfig, classes: Sequence[str]) -> PatchGrid:
    """The patches of a stage."""
    return PatchGrid(
        stage.patch_size,
        stage.spacing_mm,
        config.model.hu_windows,
        config.loss.sample_voxels,
        tuple(classes),
    )


def batches(
    mixture: Mixture,
    config: RunConfig,
    classes: Sequence[str],
    *,
    first_step: int,
    whole: Mixture | None = None,
    rank: int = 0,
    processes: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """The batches of one process from optimiser step `first_step` on, through all stages.

    whole: the mixture of the stages that train on all cases. A step takes `accumulation` batches.
    They are made beside the training by `config.workers` processes.
    """
    first_number, stage_start = 0, 0
    for stage in config.stages:
        a_batch = processes * stage.batch_size
        done = min(max(first_step - stage_start, 0), stage.steps)
        numbers = BatchNumbers(
            first_number + done * stage.accumulation * a_batch,
            (stage.steps - done) * stage.accumulation,
            stage.batch_size,
            rank,
            processes,
        )
        if len(numbers):
            drawn_from = whole if stage.all_cases and whole is not None else mixture
            samples = _Numbered(drawn_from, grid_of(config, stage, classes), config.echo)
            yield from _loader(samples, numbers, config)
        first_number += stage.steps * stage.accumulation * a_batch
        stage_start += stage.steps


def _loader(
    dataset: _Numbered, numbers: BatchNumbers, config: RunConfig
) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=numbers,
        num_workers=config.workers,
        prefetch_factor=_PREFETCHED if config.workers else None,
        worker_init_fn=_one_thread,
        pin_memory=torch.cuda.is_available(),
        # Its own, or starting the workers would draw from the global one: on a resume at another
        # moment than in the unbroken run.
        generator=torch.Generator().manual_seed(0),
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
