"""What a run's configuration says about its samples: their store, sources, grids and batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from foundation.pretraining.config import RunConfig, StageConfig
from foundation.training import mixture as numbered
from foundation.training.mixture import Mixture, Steps
from foundation.training.sample import PatchGrid
from foundation.training.sources import Source, SourceData

if TYPE_CHECKING:
    from foundation.data.store.arrays import Store


def open_store(config: RunConfig) -> Store | None:
    """Open the store that a run names, if it names one.

    Raises:
        MissingExtraError: blosc2 is not installed.
        UsageError: The folder holds no store.
    """
    if config.store is None:
        return None
    from foundation.data.store.arrays import Store

    return Store(config.store)


def build_sources(config: RunConfig, store: Store | None, held_out: frozenset[str]) -> list[Source]:
    """Build the sources of a run; an entry may become several.

    Args:
        config: Its entries build themselves.
        store: The run's, see `open_store`.
        held_out: Keys of cases that are not trained on.

    Raises:
        UsageError: There is no store where a source needs one, or nothing is in it.
    """
    data = SourceData(store, held_out, config.seed)
    built = [source for entry in config.sources for source in entry.build(data)]
    return [source for source in built if source.weight > 0]


def grid_of(config: RunConfig, stage: StageConfig, classes: Sequence[str]) -> PatchGrid:
    """Return the grid of a stage's patches; its target has a channel for each of `classes`."""
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
    """Yield the batches of one process of a run; see `training.mixture.batches`.

    Args:
        mixture: What samples are drawn from.
        config: Of the run.
        classes: In the order of the target's channels.
        first_step: Optimiser step of the first batch.
        whole: The mixture of the stages that train on all cases; `mixture` if not given.
        rank: Of this process.
        processes: How many there are.
    """
    stages = [
        Steps(
            stage.steps,
            whole if stage.all_cases and whole is not None else mixture,
            grid_of(config, stage, classes),
            stage.batch_size,
            stage.accumulation,
        )
        for stage in config.stages
    ]
    return numbered.batches(
        stages,
        first_step=first_step,
        rank=rank,
        processes=processes,
        echo=config.echo,
        workers=config.workers,
    )
