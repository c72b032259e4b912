"""Training patches of a few labelled scans, with labels for the old classes where wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from foundation.data.store.arrays import StoredCase
from foundation.imaging.bits import pack, unpack
from foundation.imaging.frame import window_hu
from foundation.inference.predict import segment_volume
from foundation.model import UniversalModel
from foundation.synthesis.patch import Sample, draw_voxels, rotation
from foundation.synthesis.scanner import blur
from foundation.training.mixture import PatchGrid
from foundation.training.scans import resample

_ON_NEW = 0.8  # of the patches are placed on a new class, the others anywhere
_JITTER = 0.25  # of the patch: how far its middle lies from the voxel that it is placed on, at most
_GAIN, _OFFSET_HU, _NOISE_HU = 0.08, 20.0, 20.0
_BLURRED, _BLUR_VOXELS = 0.3, (0.3, 0.9)
_DEFORMED = 0.8  # of the patches are turned and stretched: a handful of bodies stands for all
_TURN_RAD, _STRETCH = (0.08, 0.08, 0.16), (0.12, 0.07)  # about X Y Z; of all axes, of each
_REACH = 1.35  # of the patch is read for one that is turned and stretched


@dataclass(frozen=True)
class Patch:
    """A part of a scan on the grid of a patch, (X, Y, Z) each.

    hu; labels: label values; known bool: voxels whose label means something.
    crop: first voxel and size of the part of the case that was read. lattice (X, Y, Z, 3): where in
    it the patch's voxels lie, as `grid_sample` counts; None where it is that part itself.
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

    new: names of the new classes. absent: old classes that count as labelled and absent where a
    scan does not label them. pseudo: case key → old class → mask (X, Y, Z) on the case's grid,
    bits packed; such classes count as labelled, but for the voxels of the scan's own labels.
    augment: turn and stretch; vary contrast, sharpness and noise.
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
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        patch = self.patch(rng, generator, grid)
        case, values = patch.case, patch.labels
        count = values.numel() if grid.voxels is None else grid.voxels
        voxels, weight = draw_voxels(values, count, generator)
        annotated = np.isin(grid.classes, [*case.annotated, *self.absent])
        chosen = values.reshape(-1)[voxels].long()
        target = torch.from_numpy(case.membership(grid.classes) & annotated)[chosen].T.contiguous()
        self._add_pseudo(patch, grid, voxels, target, annotated)
        return Sample(
            image=window_hu(patch.hu, grid.hu_windows),
            voxels=voxels,
            target=target,
            annotated=torch.from_numpy(annotated),
            weight=patch.known.reshape(-1)[voxels] * weight,
        )

    def patch(self, rng: np.random.Generator, generator: torch.Generator, grid: PatchGrid) -> Patch:
        """One random patch, with the labels of all its voxels."""
        case = self.cases[int(rng.integers(len(self.cases)))]
        deforms = self.augment and rng.random() < _DEFORMED
        start, size = self._place(case, grid, rng, _REACH if deforms else 1.0)
        hu, labels, inside = case.read(start, size)
        assert hu is not None  # label maps without a scan are refused when data are read
        lattice = draw_lattice(size, patch_in(case, grid), grid.size, rng) if deforms else None
        image, values, covered = _on_grid(hu, labels, inside, grid, lattice)
        if self.augment:
            image = vary(image, rng, generator)
        known = covered & ~torch.isin(values, torch.tensor([*case.unknown]))
        return Patch(case, image, values, known, (start, size), lattice)

    def _place(
        self, case: StoredCase, grid: PatchGrid, rng: np.random.Generator, reach: float
    ) -> tuple[list[int], list[int]]:
        size = np.ceil(patch_in(case, grid) * reach).astype(np.int64)
        shape = np.asarray(case.shape)
        centres = case.centres
        present = [name for name in self.new if name in centres]
        middle = rng.uniform(0, shape)
        if present and rng.random() < _ON_NEW:
            positions = centres[present[int(rng.integers(len(present)))]]
            middle = positions[int(rng.integers(len(positions)))].astype(float)
            middle += rng.uniform(-_JITTER, _JITTER, 3) * size / reach
        return start_of(middle, size, shape).tolist(), size.tolist()

    def _add_pseudo(
        self,
        patch: Patch,
        grid: PatchGrid,
        voxels: Tensor,
        target: Tensor,
        annotated: NDArray[np.bool_],
    ) -> None:
        """Write the old model's masks into `target` and `annotated`; real labels come first."""
        labelled = target.any(0)
        for name, bits in self.pseudo.get(patch.case.key, {}).items():
            channel = grid.classes.index(name)
            if annotated[channel]:
                continue
            mask = unpack(bits, patch.case.shape[2])
            part = torch.from_numpy(cut(mask, *patch.crop))
            if patch.lattice is not None:
                part = _nearest(part, patch.lattice.reshape(-1, 3)[voxels])
            else:
                if tuple(patch.crop[1]) != tuple(grid.size):
                    part = resample(part.float(), part.int(), part, grid.size)[1].bool()
                part = part.reshape(-1)[voxels]
            target[channel] = part & ~labelled
            annotated[channel] = True


def draw_lattice(
    read: Sequence[int],
    size: NDArray[np.int64],
    grid: Sequence[int],
    rng: np.random.Generator,
) -> Tensor:
    """Where in a part of `read` voxels a turned and stretched patch lies, around its middle.

    size (3,): the patch in the part's voxels. grid: its own voxels X, Y, Z. Returns (X, Y, Z, 3) in
    the coordinates of `grid_sample` with axes in the order Z, Y, X.
    """
    stretch = np.exp(rng.normal(0, _STRETCH[0]) + rng.normal(0, _STRETCH[1], 3)).clip(0.75, 1.3)
    matrix = rotation(rng.normal(0, _TURN_RAD)) @ np.diag(size / 2 / stretch)
    matrix = 2 * matrix / np.asarray(read)[:, None]
    lines = [torch.linspace(-1 + 1 / n, 1 - 1 / n, n) for n in grid]
    plain = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
    return (plain @ torch.from_numpy(matrix.T).float()).flip(-1)


def _nearest(values: Tensor, lattice: Tensor) -> Tensor:
    """Values (x, y, z) at the places (…, 3) of a lattice; 0 outside. For up to 2²⁴ values."""
    places = lattice.reshape(1, 1, 1, -1, 3)
    found = functional.grid_sample(
        values[None, None].float(), places, "nearest", "zeros", align_corners=False
    )
    return found.view(lattice.shape[:-1]).to(values.dtype)


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
    hu: NDArray[np.int16],
    labels: NDArray[np.integer],
    inside: NDArray[np.bool_],
    grid: PatchGrid,
    lattice: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.from_numpy(hu.astype(np.float32))
    values, covered = torch.from_numpy(labels.astype(np.int32)), torch.from_numpy(inside)
    if lattice is not None:
        turned = functional.grid_sample(
            image[None, None], lattice[None], "bilinear", "border", align_corners=False
        )
        return turned[0, 0], _nearest(values, lattice), _nearest(covered, lattice)
    if tuple(image.shape) == tuple(grid.size):
        return image, values, covered
    return resample(image, values, covered, grid.size)


def vary(hu: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """A scan (X, Y, Z) in HU as another scanner might give it: gain, offset, sharpness, noise."""
    if rng.random() < _BLURRED:
        hu = blur(hu, rng.uniform(*_BLUR_VOXELS))
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
        found[case.key] = {name: pack(masks.mask(name)) for name in missing}
    return found
