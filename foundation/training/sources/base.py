"""What a source of training samples is, and the register of those that a configuration may name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

import numpy as np

from foundation.errors import UsageError
from foundation.training.sample import PatchGrid, Sample

if TYPE_CHECKING:  # reading a store needs an extra; phantoms do without
    from foundation.data.store.arrays import Store


class Source(Protocol):
    """Something that samples are drawn from.

    Attributes:
        name: For the log.
        weight: How often it is drawn, relative to the others.
    """

    name: str
    weight: float

    def draw(self, rng: np.random.Generator, grid: PatchGrid) -> Sample:
        """Draw one random sample.

        Args:
            rng: The only source of chance.
            grid: What is asked for.
        """


@dataclass(frozen=True)
class SourceData:
    """What a run has for its sources.

    Attributes:
        store: The run's store of prepared cases; None if it names none.
        held_out: Keys of cases that are not trained on.
        seed: Of the run.
    """

    store: Store | None
    held_out: frozenset[str]
    seed: int

    def store_for(self, kind: str) -> Store:
        """Return the store.

        Args:
            kind: Of the source that needs it.

        Raises:
            UsageError: There is none.
        """
        if self.store is None:
            raise UsageError(f"A source of {kind} needs --store, made by `universal-ct prepare`.")
        return self.store


class SourceConfig(Protocol):
    """An entry of a configuration's `sources`: a frozen dataclass, whose fields are its keys.

    Attributes:
        kind: By which an entry names this class.
        weight: How often its sources are drawn, relative to others.
        cubic: Whether its patches are cubes only.
    """

    cubic: ClassVar[bool]

    @property
    def kind(self) -> str:
        """By which an entry names this class; the field's default."""

    @property
    def weight(self) -> float:
        """How often its sources are drawn, relative to others."""

    def build(self, data: SourceData) -> list[Source]:
        """Make the sources that the entry describes.

        Raises:
            UsageError: The data that it needs are not there.
        """


_Config = TypeVar("_Config", bound=type[SourceConfig])
SOURCES: dict[str, type[SourceConfig]] = {}  # by kind


def register_source(config: _Config) -> _Config:
    """Let configurations name a kind of source; decorates the dataclass of its entries.

    `foundation.pretraining` looks at the register when it is imported: register before that.

    Args:
        config: A frozen dataclass as `SourceConfig` describes it. Its field `kind` is a Literal
            whose default is its own value.

    Returns:
        `config`.

    Raises:
        UsageError: Another class is registered by this kind.
    """
    kind = str(config.kind)
    if kind in SOURCES:
        raise UsageError(f"A source of kind {kind!r} is registered already: {SOURCES[kind]}.")
    SOURCES[kind] = config
    return config
