"""Patches of prepared scans: placed by label, augmented as the paper does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from foundation.errors import UsageError, listed
from foundation.imaging.frame import window_hu
from foundation.taxonomy import CLASSES
from foundation.training.augment import AugmentationConfig, draw_zoom, rotate, shift
from foundation.training.crops import crop_size, crop_start, read_crop, resample
from foundation.training.sample import PatchGrid, Sample, draw_truth
from foundation.training.sources.base import Source, SourceData, register_source

if TYPE_CHECKING:  # reading a store needs an extra; synthesis and phantoms do without
    from foundation.data.store.arrays import StoredCase

BACKGROUND = "background"
_LESIONS = frozenset(c.name for c in CLASSES if c.kind == "lesion")


@dataclass(frozen=True)
class CropConfig:
    """How often a patch is placed on what; only the ratios count.

    What a scan does not have leaves its share to the others.

    Attributes:
        background: No class there.
        foreground: A class, each that is present alike.
        organ: The same, among organs alone.
        tumor: The same, among lesions alone.

    Raises:
        UsageError: A share is negative, or all are 0.
    """

    background: float = 1.0
    foreground: float = 2.0
    organ: float = 0.0
    tumor: float = 0.0

    def __post_init__(self) -> None:
        shares = (self.background, self.foreground, self.organ, self.tumor)
        if min(shares) < 0 or sum(shares) <= 0:
            raise UsageError(f"crops are {shares}; give shares of 0 or more.")


@register_source
@dataclass(frozen=True)
class ScansConfig:
    """Crops of prepared scans, a source for each dataset.

    Attributes:
        kind: "scans".
        weight: Of each dataset, so that datasets of equal weight are drawn alike, whatever their
            size.
        datasets: Ids, or all of the store's if empty.
        crops: Where patches are placed.
        augmentation: How they are changed.
    """

    kind: Literal["scans"] = "scans"
    weight: float = 1.0
    datasets: tuple[str, ...] = ()
    crops: CropConfig = field(default_factory=CropConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    cubic: ClassVar[bool] = False

    def build(self, data: SourceData) -> list[Source]:
        """Make one source for each dataset, of its cases with a scan.

        Raises:
            UsageError: There is no store, it has no such dataset, or no scan of it that may be
                trained on.
        """
        store = data.store_for(self.kind)
        by_dataset: dict[str, list[StoredCase]] = {}
        keys = store.keys()
        for key in keys:
            dataset = key.split("/")[0]
            if key not in data.held_out and (not self.datasets or dataset in self.datasets):
                case = store.case(key)
                if case.has_ct and case.weight > 0:
                    by_dataset.setdefault(dataset, []).append(case)
        if missing := [name for name in self.datasets if name not in by_dataset]:
            present = sorted({key.split("/")[0] for key in keys})
            raise UsageError(
                f"The store has no scans of dataset {listed(missing)} to train on; it has "
                f"{listed(present, 40)}. Prepare them, or name others in `datasets`."
            )
        if not by_dataset:
            raise UsageError("The store has no scan to train on. Run `universal-ct prepare` first.")
        return [
            Scans(name, self.weight, cases, self.crops, self.augmentation)
            for name, cases in sorted(by_dataset.items())
        ]


@dataclass
class Scans:
    """The scans of one dataset; see `Source`. Cases are drawn by their own weights."""

    name: str
    weight: float
    cases: Sequence[StoredCase]
    crops: CropConfig
    augmentation: AugmentationConfig

    def draw(self, rng: np.random.Generator, grid: PatchGrid) -> Sample:
        """As `Source.draw`."""
        weights = np.array([case.weight for case in self.cases], dtype=float)
        case = self.cases[int(rng.choice(len(self.cases), p=weights / weights.sum()))]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        size = crop_size(case, grid, draw_zoom(self.augmentation, rng))
        centre = draw_centre(case, self.crops, rng)
        if centre is None:
            centre = rng.uniform(0, case.shape)
        volumes = read_crop(case, crop_start(centre, size, case.shape), size)
        hu, labels, inside = rotate(self.augmentation, resample(*volumes, grid.size), rng)
        image = shift(self.augmentation, window_hu(hu, grid.hu_windows), rng)
        truth = draw_truth(
            labels,
            inside,
            case.membership(grid.classes),
            np.isin(grid.classes, case.annotated),
            grid.voxels,
            generator,
            unknown=case.unknown,
        )
        return Sample(image=image, **truth)


def draw_centre(
    case: StoredCase, crops: CropConfig, rng: np.random.Generator
) -> NDArray[np.float64] | None:
    """Draw a voxel to place a patch on.

    Among classes each that is present counts alike; the published code draws among voxels, so that
    there large organs take nearly all patches.

    Args:
        case: The scan.
        crops: How often a patch is placed on what.
        rng: The source of chance.

    Returns:
        Position (3,) in voxels of the case; None for anywhere in the scan.
    """
    centres = case.centres  # read from the disk: the names, then one array
    names = [name for name in centres if name != BACKGROUND]
    lesions = [name for name in names if name in _LESIONS]
    kinds: list[tuple[list[str], float]] = [
        ([BACKGROUND] if BACKGROUND in centres else [], crops.background),
        (names, crops.foreground),
        ([name for name in names if name not in _LESIONS], crops.organ),
        (lesions, crops.tumor),
    ]
    possible = [(found, share) for found, share in kinds if found and share > 0]
    if not possible:
        return None
    shares = np.array([share for _, share in possible])
    found = possible[int(rng.choice(len(possible), p=shares / shares.sum()))][0]
    positions = centres[found[int(rng.integers(len(found)))]]
    return np.asarray(positions[int(rng.integers(len(positions)))], dtype=float)
