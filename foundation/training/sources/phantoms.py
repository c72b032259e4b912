"""Generated bodies, rendered as label maps are: patches without any data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from foundation.errors import UsageError
from foundation.synthesis.anatomy import Anatomy, phantom_anatomy
from foundation.training.sample import PatchGrid, Sample
from foundation.training.sources.base import Source, SourceData, register_source
from foundation.training.sources.synthesis import sample_view


@register_source
@dataclass(frozen=True)
class PhantomsConfig:
    """Generated bodies, rendered as label maps are.

    Attributes:
        kind: "phantoms".
        weight: How often this source is drawn, relative to the others.
        count: How many different ones.

    Raises:
        UsageError: `count` is not above 0.
    """

    kind: Literal["phantoms"] = "phantoms"
    weight: float = 1.0
    count: int = 24
    cubic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"count is {self.count}; at least one phantom is needed.")

    def build(self, data: SourceData) -> list[Source]:
        """Name the phantoms of this run's seed; see `SourceConfig.build`."""
        return [Phantoms(self.kind, self.weight, self.count, data.seed)]


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
        return sample_view(self._made[chosen], rng, grid)
