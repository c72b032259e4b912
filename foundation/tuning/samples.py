"""Training patches of a few labelled scans, with labels for the old classes where wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foundation.inference import segment_volume
from foundation.model import UniversalModel
from foundation.preparation.store import StoredCase
from foundation.pretraining.mixture import PatchGrid
from foundation.pretraining.sampler import Sample, draw_voxels
from foundation.pretraining.scans import resample
from foundation.transforms import window_hu

_ON_NEW = 0.8  # of the patches are placed on a new class, the others anywhere
_JITTER = 0.25  # of the patch: how far its middle lies from the voxel that it is placed on, at most
_GAIN, _OFFSET_HU, _NOISE_HU = 0.08, 20.0, 12.0


@dataclass
class FewScans:
    """A handful of scans, patches of which are placed on the new classes, each class alike.

    new: names of the new classes. absent: old classes that count as labelled and absent where a
    scan does not label them. pseudo: case key → old class → mask (X, Y, Z) on the case's grid,
    bits packed; such classes count as labelled, but for the voxels of the scan's own labels.
    augment: vary contrast and noise.
    """

    cases: Sequence[StoredCase]
    new: tuple[str, ...]
    absent: tuple[str, ...] = ()
    pseudo: Mapping[str, Mapping[str, NDArray[np.uint8]]] = field(default_factory=dict)
    augment: bool = True
    name: str = "scans"
    weight: float = 1.0

    def draw(self, rng: np.random.Generator, grid: PatchGrid) -> Sample:
        """As `mixture.Source.draw`."""
        case = self.cases[int(rng.integers(len(self.cases)))]
        start, size = self._place(case, grid, rng)
        hu, labels, inside = case.read(start, size)
        assert hu is not None  # label maps without a scan are refused when data are read
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        image, values, covered = _on_grid(hu, labels, inside, grid)
        if self.augment:
            image = vary(image, rng, generator)
        count = values.numel() if grid.voxels is None else grid.voxels
        voxels, weight = draw_voxels(values, count, generator)
        chosen = values.reshape(-1)[voxels].long()
        known = covered.reshape(-1)[voxels] & ~torch.isin(chosen, torch.tensor([*case.unknown]))
        annotated = np.isin(grid.classes, [*case.annotated, *self.absent])
        target = torch.from_numpy(case.membership(grid.classes) & annotated)[chosen].T.contiguous()
        self._add_pseudo(case, start, size, grid, voxels, target, annotated)
        return Sample(
            image=window_hu(image, grid.hu_windows),
            voxels=voxels,
            target=target,
            annotated=torch.from_numpy(annotated),
            weight=known * weight,
        )

    def _place(
        self, case: StoredCase, grid: PatchGrid, rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        size = patch_in(case, grid)
        shape = np.asarray(case.shape)
        centres = case.centres
        present = [name for name in self.new if name in centres]
        middle = rng.uniform(0, shape)
        if present and rng.random() < _ON_NEW:
            positions = centres[present[int(rng.integers(len(present)))]]
            middle = positions[int(rng.integers(len(positions)))].astype(float)
            middle += rng.uniform(-_JITTER, _JITTER, 3) * size
        return start_of(middle, size, shape).tolist(), size.tolist()

    def _add_pseudo(
        self,
        case: StoredCase,
        start: Sequence[int],
        size: Sequence[int],
        grid: PatchGrid,
        voxels: Tensor,
        target: Tensor,
        annotated: NDArray[np.bool_],
    ) -> None:
        """Write the old model's masks into `target` and `annotated`; real labels come first."""
        labelled = target.any(0)
        for name, bits in self.pseudo.get(case.key, {}).items():
            channel = grid.classes.index(name)
            if annotated[channel]:
                continue
            mask = np.unpackbits(bits, axis=-1, count=case.shape[2]).astype(bool)
            part = torch.from_numpy(cut(mask, start, size))
            if tuple(size) != tuple(grid.size):
                part = resample(part.float(), part.int(), part, grid.size)[1].bool()
            target[channel] = part.reshape(-1)[voxels] & ~labelled
            annotated[channel] = True


def patch_in(case: StoredCase, grid: PatchGrid) -> NDArray[np.int64]:
    """Voxels of the case that a patch of the grid takes, (3,)."""
    factor = grid.spacing_mm / case.spacing_mm
    return np.maximum(1, np.rint(np.asarray(grid.size) * factor)).astype(np.int64)


def start_of(
    middle: NDArray[np.float64], size: NDArray[np.int64], shape: NDArray[np.int64]
) -> NDArray[np.int64]:
    """First voxel of a patch around `middle`, inside the scan; centred where that is smaller."""
    start = np.rint(middle - size / 2).astype(np.int64)
    inside = np.clip(start, 0, np.maximum(shape - size, 0))
    return np.where(shape >= size, inside, (shape - size) // 2)


def cut(mask: NDArray[np.bool_], start: Sequence[int], size: Sequence[int]) -> NDArray[np.bool_]:
    """A crop of a mask that may reach beyond it; False there."""
    found = np.zeros(tuple(size), bool)
    source, target = [], []
    for first, length, full in zip(start, size, mask.shape, strict=True):
        low, high = max(0, first), max(0, min(full, first + length))
        source.append(slice(min(low, full), high))
        target.append(slice(min(low, full) - first, max(min(low, full), high) - first))
    found[tuple(target)] = mask[tuple(source)]
    return found


def _on_grid(
    hu: NDArray[np.int16], labels: NDArray[np.integer], inside: NDArray[np.bool_], grid: PatchGrid
) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.from_numpy(hu.astype(np.float32))
    values, covered = torch.from_numpy(labels.astype(np.int32)), torch.from_numpy(inside)
    if tuple(image.shape) == tuple(grid.size):
        return image, values, covered
    return resample(image, values, covered, grid.size)


def vary(hu: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """A scan (X, Y, Z) in HU as another scanner might have given it: gain, offset, noise."""
    hu = hu * rng.uniform(1 - _GAIN, 1 + _GAIN) + rng.uniform(-_OFFSET_HU, _OFFSET_HU)
    return hu + rng.uniform(0, _NOISE_HU) * torch.randn(hu.shape, generator=generator)


def pseudo_labels(
    model: UniversalModel, cases: Sequence[StoredCase], classes: Sequence[str], progress: bool
) -> dict[str, dict[str, NDArray[np.uint8]]]:
    """The model's masks of `classes`, cleaned up, for every case that does not label them.

    Case key → class → mask (X, Y, Z) on the case's grid with its bits packed along Z; see
    `FewScans.pseudo`.
    """
    found: dict[str, dict[str, NDArray[np.uint8]]] = {}
    for case in cases:
        missing = [name for name in classes if name not in case.annotated]
        hu = case.read_ct()
        if hu is None or not missing:
            continue
        volume = (hu.astype(np.float32), np.asarray(case.affine))
        masks = segment_volume(model, volume, classes=missing, progress=progress)
        found[case.key] = {name: np.packbits(masks.mask(name), axis=-1) for name in missing}
    return found
