"""Patches of prepared scans: placed by label, augmented as the paper does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from foundation.errors import UsageError, listed
from foundation.imaging.frame import window_hu
from foundation.pretraining.config import AugmentationConfig, CropConfig, ScansConfig, Size
from foundation.synthesis.patch import Sample, draw_voxels
from foundation.taxonomy import CLASSES

if TYPE_CHECKING:  # reading a store needs an extra; synthesis and phantoms do without
    from foundation.data.store.arrays import Store, StoredCase
    from foundation.training.mixture import PatchGrid

BACKGROUND = "background"
_LESIONS = frozenset(c.name for c in CLASSES if c.kind == "lesion")


@dataclass
class Scans:
    """The scans of one dataset. Cases are drawn by their own weights."""

    name: str
    weight: float
    cases: Sequence[StoredCase]
    crops: CropConfig
    augmentation: AugmentationConfig

    def draw(self, rng: np.random.Generator, grid: PatchGrid) -> Sample:
        """As `mixture.Source.draw`."""
        weights = np.array([case.weight for case in self.cases], dtype=float)
        case = self.cases[int(rng.choice(len(self.cases), p=weights / weights.sum()))]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        zoom = draw_zoom(self.augmentation, rng)
        hu, labels, inside = _read_patch(case, self.crops, grid, zoom, rng)
        hu, labels, inside = rotate(self.augmentation, (hu, labels, inside), rng)
        image = shift(self.augmentation, window_hu(hu, grid.hu_windows), rng)
        count = labels.numel() if grid.voxels is None else grid.voxels
        voxels, weight = draw_voxels(labels, count, generator)
        values = labels.reshape(-1)[voxels].long()
        known = inside.reshape(-1)[voxels]
        if len(case.unknown):
            known = known & ~torch.isin(values, torch.tensor(list(case.unknown)))
        annotated = np.isin(grid.classes, list(case.annotated))
        belongs = torch.from_numpy(case.membership(grid.classes) & annotated)[values]
        return Sample(
            image=image,
            voxels=voxels,
            target=belongs.T.contiguous(),
            annotated=torch.from_numpy(annotated),
            weight=known * weight,
        )


def scan_sources(entry: ScansConfig, store: Store, held_out: frozenset[str]) -> list[Scans]:
    """One source for each dataset that the entry names, of its cases with a scan.

    Raises:
        UsageError: the store has no such dataset, or no scan of it that may be trained on.
    """
    by_dataset: dict[str, list[StoredCase]] = {}
    present = {key.split("/")[0] for key in store.keys()}  # noqa: SIM118
    for key in store.keys():  # noqa: SIM118
        dataset = key.split("/")[0]
        if key not in held_out and (not entry.datasets or dataset in entry.datasets):
            case = store.case(key)
            if case.has_ct and case.weight > 0:
                by_dataset.setdefault(dataset, []).append(case)
    if missing := [name for name in entry.datasets if name not in by_dataset]:
        raise UsageError(
            f"The store has no scans of dataset {listed(missing)} to train on; it has "
            f"{listed(sorted(present), 40)}. Prepare them, or name others in `datasets`."
        )
    if not by_dataset:
        raise UsageError("The store has no scan to train on. Run `universal-ct prepare` first.")
    return [
        Scans(name, entry.weight, cases, entry.crops, entry.augmentation)
        for name, cases in sorted(by_dataset.items())
    ]


def draw_centre(
    case: StoredCase, crops: CropConfig, rng: np.random.Generator
) -> NDArray[np.float64] | None:
    """A voxel of what the patch is placed on; None for anywhere in the scan.

    Among classes each that is present counts alike; the published code draws among voxels, so that
    there large organs take nearly all patches.
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


def _read_patch(
    case: StoredCase, crops: CropConfig, grid: PatchGrid, zoom: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """HU, label values and inside, (X, Y, Z) each, on the grid's spacing divided by `zoom`."""
    factor = grid.spacing_mm / case.spacing_mm / zoom
    read = np.maximum(1, np.rint(np.array(grid.size) * factor)).astype(int)
    shape = np.asarray(case.shape)
    centre = draw_centre(case, crops, rng)
    if centre is None:
        centre = rng.uniform(0, shape)
    # Moved back into the scan where it is large enough; centred on it where it is not.
    start = np.rint(centre - read / 2).astype(int)
    start = np.where(shape >= read, np.clip(start, 0, shape - read), (shape - read) // 2)
    hu, labels, inside = case.read(start.tolist(), read.tolist())
    assert hu is not None  # cases without a scan are not among the source's
    image = torch.from_numpy(np.asarray(hu, dtype=np.float32))
    values = torch.from_numpy(np.asarray(labels).astype(np.int32))
    covered = torch.from_numpy(np.asarray(inside, dtype=bool))
    if tuple(read) == tuple(grid.size):
        return image, values, covered
    return resample(image, values, covered, grid.size)


def resample(
    hu: Tensor, labels: Tensor, inside: Tensor, size: Size
) -> tuple[Tensor, Tensor, Tensor]:
    """(X, Y, Z) volumes brought to `size`: HU linear or, where it gets coarser, averaged."""
    coarser = all(new <= old for new, old in zip(size, hu.shape, strict=True))
    options: dict[str, Any] = {"mode": "area"}
    if not coarser:
        options = {"mode": "trilinear", "align_corners": False}
    image = functional.interpolate(hu[None, None], size=size, **options)[0, 0]
    # Label values and the flag, exact as floats, by nearest neighbour.
    both = torch.stack([labels.float(), inside.float()])[None]
    nearest = functional.interpolate(both, size=size, mode="nearest-exact")[0]
    return image, nearest[0].to(torch.int32), nearest[1].bool()


def draw_zoom(augmentation: AugmentationConfig, rng: np.random.Generator) -> float:
    """By how much the patch is enlarged; 1 for not at all."""
    if rng.random() >= augmentation.zoom_probability:
        return 1.0
    return float(rng.uniform(*augmentation.zoom))


def rotate(
    augmentation: AugmentationConfig,
    volumes: tuple[Tensor, Tensor, Tensor],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """The volumes (X, Y, Z) turned together by quarters in the axial plane, or as they are."""
    if rng.random() >= augmentation.rotate_probability:
        return volumes
    quarters = int(rng.integers(1, 4))
    first = volumes[0]
    if first.shape[0] != first.shape[1]:
        quarters = 2  # a quarter would exchange the sides
    hu, labels, inside = (torch.rot90(volume, quarters, (0, 1)) for volume in volumes)
    return hu, labels, inside


def shift(augmentation: AugmentationConfig, image: Tensor, rng: np.random.Generator) -> Tensor:
    """image (C, X, Y, Z) in [0, 1], brighter or darker by one number; not clipped, as published."""
    if rng.random() >= augmentation.shift_probability:
        return image
    return image + float(rng.uniform(-augmentation.shift, augmentation.shift))
