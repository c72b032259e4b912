"""Draw a random view of an anatomy: deform its label map, grow lesions in it, render it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foundation.synthesis import deform
from foundation.synthesis.anatomy import (
    COARSE_MM,
    FINE_MM,
    SKIN_MARGIN,
    Anatomy,
    membership_of,
)
from foundation.synthesis.lesions import grow_lesion
from foundation.synthesis.render import render_ct
from foundation.synthesis.scanner import AIR_HU

# Share of the views that are rendered on a grid twice as fine and averaged: true partial volume, at
# eight times the cost.
_OVERSAMPLED = 0.02
_WITH_LESIONS = 0.4  # share of the views that have one to three
# Organs that people lack: after surgery, or from birth.
_REMOVABLE = ("gallbladder", "kidney_left", "kidney_right", "spleen", "uterus", "prostate")


@dataclass(frozen=True)
class View:
    """An anatomy as a scan of it shows it: deformed, and cut off where scans end.

    Attributes:
        hu: HU (X, Y, Z), RAS; AIR_HU where the voxel is not `covered`.
        labels: Label values (X, Y, Z).
        names: Label value → tissue.
        sets: Label value → the annotated classes that its voxels belong to.
        covered: bool (X, Y, Z), whether the scan covers the voxel.
    """

    hu: Tensor
    labels: Tensor
    names: Mapping[int, str]
    sets: Mapping[int, frozenset[str]]
    covered: Tensor

    def membership(self, classes: Sequence[str]) -> NDArray[np.bool_]:
        """Return to which classes the voxels of each label value belong.

        Args:
            classes: The K classes that are asked about; any names.

        Returns:
            bool (256, K).
        """
        return membership_of(self.sets, classes)


def draw_view(
    anatomy: Anatomy,
    size: int,
    spacing_mm: float,
    rng: np.random.Generator,
    generator: torch.Generator,
    *,
    lesions: bool = True,
) -> View:
    """Draw one view of a label map: deformed, rendered, perhaps with lesions grown in.

    Args:
        anatomy: Its label map is rendered; a scan that it may have is not looked at.
        size: Voxels of the view along each axis.
        spacing_mm: Of the view, isotropic.
        rng: The source of chance for single numbers.
        generator: The source of chance for fields.
        lesions: Whether lesions may be grown.

    Returns:
        The view, on a grid of `size` voxels along each axis.
    """
    fine_per_voxel = 2 if rng.random() < _OVERSAMPLED else 1
    fine_mm = spacing_mm / fine_per_voxel
    centre = deform.draw_centre(anatomy, size * spacing_mm, rng)
    bumps = deform.draw_bumps(anatomy, rng)
    positions = deform.draw_positions(
        size, fine_per_voxel, spacing_mm, centre, bumps, rng, generator
    )
    fine_labels = deform.gather(torch.from_numpy(anatomy.label_map), positions, fill=0)
    names, sets = dict(anatomy.names), dict(anatomy.sets)
    _remove_organ(fine_labels, names, rng)
    if lesions and rng.random() < _WITH_LESIONS:
        for _ in range(int(rng.integers(1, 4))):
            grow_lesion(fine_labels, sets, names, anatomy.annotated, fine_mm, rng, generator)
    hu = _render(anatomy, fine_labels, names, positions, fine_per_voxel, fine_mm, rng)
    labels = deform.majority(fine_labels, fine_per_voxel)
    covered = deform.draw_field_of_view(anatomy, positions, fine_per_voxel, rng)
    hu[~covered] = AIR_HU
    return View(hu, labels, names, sets, covered)


def _remove_organ(
    labels: Tensor, names: Mapping[int, str], rng: np.random.Generator, probability: float = 0.12
) -> None:
    """Perhaps take out an organ, in place: its voxels become fat, or unlabelled tissue."""
    if rng.random() >= probability:
        return
    name = _REMOVABLE[int(rng.integers(len(_REMOVABLE)))]
    fat = next((value for value, label in names.items() if label == "fat"), 0)
    for value in [value for value, label in names.items() if label == name]:
        labels[labels == value] = fat


def _render(
    anatomy: Anatomy,
    labels: Tensor,
    names: Mapping[int, str],
    positions: Tensor,
    pool: int,
    fine_mm: float,
    rng: np.random.Generator,
) -> Tensor:
    """HU (X, Y, Z) of a rendered label map, around it a body of random build where it has none."""
    fat_mm, muscle_mm = rng.uniform(4, 45), rng.uniform(5, 18)
    depth_mm = None
    if anatomy.skin_mm is not None:
        in_skin_map = positions * (FINE_MM / COARSE_MM) + SKIN_MARGIN
        depth_mm = -deform.interpolate_smooth(torch.from_numpy(anatomy.skin_mm), in_skin_map)
        if not anatomy.has_skin:
            # The map is of the hull of the organs; the skin lies a wall and a layer of fat outside.
            depth_mm = depth_mm + fat_mm + muscle_mm
    rendered = render_ct(
        labels,
        names,
        fine_mm,
        rng,
        depth_mm=depth_mm,
        fat_mm=fat_mm,
        muscle_mm=muscle_mm,
        pool=pool,
    )
    return torch.from_numpy(rendered)
