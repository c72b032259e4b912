"""From a patch with labels to a training sample: the voxels of the loss and what they should be."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foundation.settings import Cube

Size = Annotated[tuple[int, int, int], Cube()]  # voxels along X, Y, Z
Window = tuple[float, float]  # HU


@dataclass(frozen=True)
class PatchGrid:
    """What a source is asked for.

    Attributes:
        size: Voxels along X, Y and Z.
        spacing_mm: Isotropic.
        hu_windows: One for each channel of the image.
        voxels: How many of the voxels the loss looks at; None for all. The head is a few 1×1×1
            convolutions, so its cost falls with them: an eighth makes a step several times faster.
        classes: Names, in the order of the target's channels.
    """

    size: Size
    spacing_mm: float
    hu_windows: tuple[Window, ...]
    voxels: int | None
    classes: tuple[str, ...]


class Truth(TypedDict):
    """What the loss compares a patch's logits with.

    Attributes:
        voxels: Flat indices (M,) of the voxels the loss looks at.
        target: bool (K, M), what they belong to.
        annotated: bool (K,), which classes this source labels.
        weight: (M,), how much each voxel counts; 0 where nothing is known. Voxels of small
            structures are drawn more often than their share and count less in return, so that sums
            estimate those over all voxels.
    """

    voxels: Tensor
    target: Tensor
    annotated: Tensor
    weight: Tensor


class Sample(Truth):
    """One training patch.

    Attributes:
        image: (C, X, Y, Z) in [0, 1], one channel a HU window, RAS.
    """

    image: Tensor


def draw_truth(
    labels: Tensor,
    known: Tensor,
    membership: NDArray[np.bool_],
    annotated: NDArray[np.bool_],
    count: int | None,
    generator: torch.Generator,
    *,
    unknown: Collection[int] = (),
) -> Truth:
    """Draw the voxels that the loss looks at, and look up what they should be.

    Args:
        labels: Label values (X, Y, Z) of the patch.
        known: bool (X, Y, Z), the voxels whose label means something.
        membership: bool (values, K), which classes each label value belongs to.
        annotated: bool (K,), the classes that the labels' source annotates. A voxel is a target of
            these only.
        count: How many voxels; None for all.
        generator: The source of chance.
        unknown: Label values that mean nothing, beside what `known` leaves out.
    """
    voxels, weight = draw_voxels(labels, labels.numel() if count is None else count, generator)
    values = labels.reshape(-1)[voxels].long()
    counts = known.reshape(-1)[voxels]
    if len(unknown):
        counts = counts & ~torch.isin(values, torch.tensor([*unknown]))
    return Truth(
        voxels=voxels,
        target=torch.from_numpy(membership & annotated)[values].T.contiguous(),
        annotated=torch.from_numpy(annotated),
        weight=weight * counts,
    )


def draw_voxels(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw voxels for the loss, and how much each counts; all voxels if `count` is as many.

    Half are drawn from all voxels, half in equal parts from every label value that is there. Each
    weighs one over how often it was to be expected: weighted sums are those of a plain draw.

    Args:
        labels: Label values (X, Y, Z).
        count: How many, M.
        generator: The source of chance.

    Returns:
        Flat indices (M,), and weights (M,).
    """
    flat = labels.reshape(-1).long()
    if count >= len(flat):
        return torch.arange(len(flat)), torch.ones(len(flat))
    half = count // 2
    sizes = torch.bincount(flat)
    per_label = half / int((sizes > 0).sum())
    rate = (count - half) / len(flat) + per_label / sizes.clamp_min(1)  # of each label's voxels
    anywhere = torch.randint(len(flat), (count - half,), generator=generator)
    # A label's voxels stand together in the sorted order: draw a label, then a place in its run.
    order = flat.to(torch.int16).argsort(stable=True)
    ends = sizes.cumsum(0)
    values = sizes.nonzero()[:, 0]
    chosen = values[torch.randint(len(values), (half,), generator=generator)]
    place = (torch.rand(half, generator=generator, dtype=torch.float64) * sizes[chosen]).long()
    voxels = torch.cat([anywhere, order[ends[chosen] - sizes[chosen] + place]])
    plain = count / len(flat)
    return voxels, (plain / rate)[flat[voxels]].float()
