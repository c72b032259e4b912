"""Label maps of a store, rendered anew for each patch, and its scans, deformed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from foundation.imaging.frame import window_hu
from foundation.synthesis.anatomy import Anatomy, load_anatomies
from foundation.synthesis.view import draw_view
from foundation.training.augment import deform_scan
from foundation.training.sample import PatchGrid, Sample, draw_truth
from foundation.training.sources.base import Source, SourceData, register_source


@register_source
@dataclass(frozen=True)
class SynthesisConfig:
    """Label maps, rendered anew each time, and scans, deformed; all of them whole in memory.

    Cases are drawn by their own weights.

    Attributes:
        kind: "synthesis".
        weight: How often this source is drawn, relative to the others.
        datasets: Ids, or all of the store's if empty.
    """

    kind: Literal["synthesis"] = "synthesis"
    weight: float = 1.0
    datasets: tuple[str, ...] = ()
    cubic: ClassVar[bool] = True

    def build(self, data: SourceData) -> list[Source]:
        """Read the anatomies of the store; see `SourceConfig.build`."""
        anatomies = load_anatomies(data.store_for(self.kind), self.datasets, data.held_out)
        return [Rendered(self.kind, self.weight, anatomies)]


@dataclass
class Rendered:
    """Anatomies in memory; see `Source`."""

    name: str
    weight: float
    anatomies: Sequence[Anatomy]

    def draw(self, rng: np.random.Generator, grid: PatchGrid) -> Sample:
        """As `Source.draw`."""
        weights = np.array([anatomy.weight for anatomy in self.anatomies])
        chosen = int(rng.choice(len(self.anatomies), p=weights / weights.sum()))
        return sample_view(self.anatomies[chosen], rng, grid)


def sample_view(anatomy: Anatomy, rng: np.random.Generator, grid: PatchGrid) -> Sample:
    """Draw one random view of an anatomy, windowed, with the voxels that the loss looks at."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    draw = draw_view if anatomy.ct is None else deform_scan
    view = draw(anatomy, grid.size[0], grid.spacing_mm, rng, generator)
    truth = draw_truth(
        view.labels,
        view.covered,
        view.membership(grid.classes),
        np.isin(grid.classes, anatomy.annotated),
        grid.voxels,
        generator,
        unknown=anatomy.unknown,
    )
    return Sample(image=window_hu(view.hu, grid.hu_windows), **truth)
