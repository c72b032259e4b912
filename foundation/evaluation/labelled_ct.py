"""Agreement of a model with the labels of one CT, on the CT's own grid, class by class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from foundation.data.masks import find_labelled
from foundation.data.reference import Reference, sides_of, union_of
from foundation.errors import UsageError
from foundation.evaluation.records import Figure
from foundation.evaluation.scores import score_masks
from foundation.imaging.result import Segmentation
from foundation.model import Model

# The organs of the development target; the mean over them is what runs are compared by.
TARGET = (
    "liver",
    "spleen",
    "kidney_right",
    "kidney_left",
    "urinary_bladder",
    "aorta",
    "colon",
)


def mean_title(name: str, figures: Iterable[Figure] = ()) -> str:
    """Say what a mean among the figures of classes is over; any other name stays.

    Args:
        name: "target", "mean", or a class.
        figures: All of its record, of which "target" names those that are there.
    """
    if name == "mean":
        return "mean over all classes present"
    if name != "target":
        return name
    present = {figure.name for figure in figures if figure.value is not None}
    return f"mean over {', '.join(organ for organ in TARGET if f'dice/{organ}' in present)}"


def reference_of(
    labels: Path, also: Mapping[str, str] | None = None, like: Segmentation | None = None
) -> Reference:
    """Read labels as classes, as `universal-ct evaluate` does.

    Args:
        labels: See `find_labelled`; one case.
        also: Other names → class.
        like: The segmentation of a CT on whose grid they must be.

    Returns:
        The labels.

    Raises:
        UsageError: Nothing names the labels, or several cases are there.
        VolumeError: The labels are on another grid.
    """
    found = list(find_labelled(labels).values())
    if len(found) > 1:
        raise UsageError(f"{labels} holds {len(found)} cases. Give the labels of one CT.")
    names = also or {}
    values = {v: tuple(names.get(n, n) for n in labels) for v, labels in found[0].values.items()}
    masks = {names.get(name, name): path for name, path in found[0].masks.items()}
    labelled = replace(found[0], values=values, masks=masks)
    grid = None
    if like is not None:
        empty = np.broadcast_to(np.uint8(0), like.volume.shape)
        grid = Reference(empty, like.volume.affine, (), ())
    return labelled.read(labelled.classes, like=grid)


def compare_with_reference(segmentation: Segmentation, reference: Reference) -> tuple[Figure, ...]:
    """Compare a segmentation with labels.

    Args:
        segmentation: Of the CT.
        reference: On the CT's grid.

    Returns:
        Of each class that both know `dice/CLASS` (no value where the reference is empty),
        `volume/CLASS` and `reference/CLASS` in ml; `dice/mean` over the classes that the reference
        shows, and `dice/target` over those of TARGET among them, if there are any.

    Raises:
        UsageError: The reference shows no class that the model knows.
    """
    sides = {name: sides_of(name, segmentation.classes) for name in reference.classes}
    known = [name for name, parts in sides.items() if parts]
    rows = list(
        score_masks(
            "",
            lambda name: union_of(segmentation.mask, sides[name]),
            ((name, reference.mask(name)) for name in known),
            segmentation.volume.spacing_mm,
            known=reference.known,
        )
    )
    dice = {row.name: row.dice for row in rows if row.dice is not None}
    if not dice:
        raise UsageError(
            f"The labels show none of the model's classes ({', '.join(segmentation.classes)}). "
            f"They label: {', '.join(reference.classes) or 'nothing'}."
        )
    figures = []
    for row in rows:
        figures += [
            Figure(f"dice/{row.name}", row.dice),
            Figure(f"volume/{row.name}", row.predicted_ml, "ml"),
            Figure(f"reference/{row.name}", row.reference_ml, "ml"),
        ]
    target = [dice[name] for name in TARGET if name in dice]
    if target:
        figures.append(Figure("dice/target", float(np.mean(target)), n=1))
    return (*figures, Figure("dice/mean", float(np.mean(list(dice.values()))), n=1))


def measure_ct(
    model: Model, ct: Path, labels: Path, also: Mapping[str, str] | None = None
) -> tuple[Figure, ...]:
    """Segment a CT as users do, and compare the masks with its labels.

    Args:
        model: Any that `from_pretrained` returns.
        ct: NIfTI file, in HU.
        labels: See `reference_of`.
        also: See `reference_of`.

    Returns:
        See `compare_with_reference`.

    Raises:
        UsageError, VolumeError: See `reference_of` and `compare_with_reference`.
    """
    segmentation = model.segment(ct)
    return compare_with_reference(segmentation, reference_of(labels, also, segmentation))
