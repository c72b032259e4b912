"""Training patches of a few labelled scans, with labels for the old classes where wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foundation.data.store.arrays import StoredCase
from foundation.imaging.bits import pack, unpack
from foundation.imaging.frame import window_hu
from foundation.inference.predict import segment_volume
from foundation.model import UniversalModel
from foundation.training.augment import draw_lattice, nearest, on_lattice, vary
from foundation.training.crops import crop_size, crop_start, read_crop, resample
from foundation.training.sample import PatchGrid, Sample, Truth, draw_truth

_ON_NEW = 0.8  # of the patches are placed on a new class, the others anywhere
_JITTER = 0.25  # of the patch: how far its middle lies from the voxel that it is placed on, at most
_DEFORMED = 0.8  # of the patches are turned and stretched: a handful of bodies stands for all
_REACH = 1.35  # of the patch is read for one that is turned and stretched


@dataclass(frozen=True)
class Patch:
    """A part of a scan on the grid of a patch.

    Attributes:
        case: The scan.
        hu: HU (X, Y, Z).
        labels: Label values (X, Y, Z).
        known: bool (X, Y, Z), voxels whose label means something.
        crop: First voxel and size of the part of the case that was read.
        lattice: Places (X, Y, Z, 3) of the patch's voxels in that part, as `grid_sample` counts;
            None where the patch is the part itself.
    """

    case: StoredCase
    hu: Tensor
    labels: Tensor
    known: Tensor
    crop: tuple[list[int], list[int]]
    lattice: Tensor | None


@dataclass
class FewScans:
    """A handful of scans, patches of which are placed on the new classes, each class alike.

    Attributes:
        cases: Prepared scans.
        new: Names of the new classes.
        absent: Old classes that count as labelled and absent where a scan does not label them.
        pseudo: Case key → old class → mask (X, Y, Z) on the case's grid, its bits packed along Z.
            Such classes count as labelled, but for the voxels of the scan's own labels.
        augment: Whether patches are turned, stretched and varied in contrast, sharpness and noise.
        name: See `Source`.
        weight: See `Source`.
    """

    cases: Sequence[StoredCase]
    new: tuple[str, ...]
    absent: tuple[str, ...] = ()
    pseudo: Mapping[str, Mapping[str, NDArray[np.uint8]]] = field(default_factory=dict)
    augment: bool = True
    name: str = "scans"
    weight: float = 1.0

    def draw(self, rng: np.random.Generator, grid: PatchGrid) -> Sample:
        """As `Source.draw`."""
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        patch = self.patch(rng, generator, grid)
        case = patch.case
        truth = draw_truth(
            patch.labels,
            patch.known,
            case.membership(grid.classes),
            np.isin(grid.classes, [*case.annotated, *self.absent]),
            grid.voxels,
            generator,
        )
        self._add_pseudo(patch, grid, truth)
        return Sample(image=window_hu(patch.hu, grid.hu_windows), **truth)

    def patch(self, rng: np.random.Generator, generator: torch.Generator, grid: PatchGrid) -> Patch:
        """Draw one random patch, with the labels of all its voxels.

        Args:
            rng: The source of chance for single numbers.
            generator: The source of chance for noise.
            grid: Of the patch.
        """
        case = self.cases[int(rng.integers(len(self.cases)))]
        deforms = self.augment and rng.random() < _DEFORMED
        start, size = self._place(case, grid, rng, _REACH if deforms else 1.0)
        volumes = read_crop(case, start, size)
        lattice = draw_lattice(size, crop_size(case, grid), grid.size, rng) if deforms else None
        if lattice is None:
            image, values, covered = resample(*volumes, grid.size)
        else:
            image, values, covered = on_lattice(volumes, lattice)
        if self.augment:
            image = vary(image, rng, generator)
        known = covered & ~torch.isin(values, torch.tensor([*case.unknown]))
        return Patch(case, image, values, known, (start, size), lattice)

    def _place(
        self, case: StoredCase, grid: PatchGrid, rng: np.random.Generator, reach: float
    ) -> tuple[list[int], list[int]]:
        size = np.ceil(crop_size(case, grid) * reach).astype(np.int64)
        centres = case.centres
        present = [name for name in self.new if name in centres]
        middle = rng.uniform(0, case.shape)
        if present and rng.random() < _ON_NEW:
            positions = centres[present[int(rng.integers(len(present)))]]
            middle = positions[int(rng.integers(len(positions)))].astype(float)
            middle += rng.uniform(-_JITTER, _JITTER, 3) * size / reach
        return crop_start(middle, size, case.shape).tolist(), size.tolist()

    def _add_pseudo(self, patch: Patch, grid: PatchGrid, truth: Truth) -> None:
        """Write the old model's masks into target and annotated; real labels come first."""
        target, annotated, voxels = truth["target"], truth["annotated"], truth["voxels"]
        labelled = target.any(0)
        for name, bits in self.pseudo.get(patch.case.key, {}).items():
            channel = grid.classes.index(name)
            if annotated[channel]:
                continue
            mask = unpack(bits, patch.case.shape[2])
            part = torch.from_numpy(cut(mask, *patch.crop))
            if patch.lattice is not None:
                part = nearest(part, patch.lattice.reshape(-1, 3)[voxels])
            else:
                part = resample(part.float(), part.int(), part, grid.size)[1].bool()
                part = part.reshape(-1)[voxels]
            target[channel] = part & ~labelled
            annotated[channel] = True


def cut(mask: NDArray[np.bool_], start: Sequence[int], size: Sequence[int]) -> NDArray[np.bool_]:
    """Cut a crop out of a mask (X, Y, Z); it may reach beyond the mask, and is False there."""
    found = np.zeros(tuple(size), bool)
    first = np.asarray(start)
    low, high = (np.clip(corner, 0, mask.shape) for corner in (first, first + size))
    found[tuple(map(slice, low - first, high - first))] = mask[tuple(map(slice, low, high))]
    return found


def pseudo_labels(
    model: UniversalModel, cases: Sequence[StoredCase], classes: Sequence[str], progress: bool
) -> dict[str, dict[str, NDArray[np.uint8]]]:
    """Segment every case that does not label all of some classes.

    Args:
        model: Its masks are taken after post-processing.
        cases: Prepared scans; those without a CT are left out.
        classes: Names of classes of the model.
        progress: Whether to show a progress bar.

    Returns:
        Case key → class → mask (X, Y, Z) on the case's grid, its bits packed along Z; see
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
        found[case.key] = {name: pack(masks.mask(name)) for name in missing}
    return found
