"""Agreement of a model with the labels of one CT, on the CT's own grid, class by class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foundation.data.reading import read_label_map
from foundation.errors import UsageError
from foundation.evaluation.records import Figure
from foundation.evaluation.scores import score_masks
from foundation.imaging.result import Segmentation
from foundation.model import Model
from foundation.settings import read_file
from foundation.taxonomy import CLASSES, TOTALSEGMENTATOR

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
LABELS = "labels.json"
# Names of means among the figures of classes, and what they are.
MEANS = {"target": f"mean over {', '.join(TARGET)}", "mean": "mean over all classes present"}
Mask = NDArray[np.bool_]


def reference_masks(labels: Path, also: Mapping[str, str] | None = None) -> dict[str, Mask]:
    """Read the masks of the classes that labels stand for.

    Args:
        labels: A label map (X, Y, Z), NIfTI, with `labels.json` beside it: value → name, of
            TotalSegmentator or ours.
        also: Other names → class.

    Returns:
        Class name → mask (X, Y, Z), bool, in the order of the taxonomy.

    Raises:
        UsageError: `labels.json` is missing or is no JSON.
        VolumeError: The label map cannot be read.
    """
    names = read_file(labels.parent / LABELS)
    label_map, _ = read_label_map(labels)
    known = [each.name for each in CLASSES]
    values: dict[str, list[int]] = {}
    for value, label in names.items():
        name = (also or {}).get(label, TOTALSEGMENTATOR.get(label, label))
        if name in known:
            values.setdefault(name, []).append(int(value))
    return {name: np.isin(label_map, values[name]) for name in known if name in values}


def compare(segmentation: Segmentation, reference: Mapping[str, Mask]) -> tuple[Figure, ...]:
    """Compare a segmentation with the masks of a reference.

    Args:
        segmentation: Of the CT.
        reference: Class name → mask (X, Y, Z) on the CT's grid.

    Returns:
        Of each class that both know `dice/CLASS` (no value where the reference is empty),
        `volume/CLASS` and `reference/CLASS` in ml; `dice/mean` over the classes that the reference
        shows, and `dice/target` over those of TARGET among them, if there are any.

    Raises:
        UsageError: The reference shows no class that the model knows.
    """
    ct = segmentation.volume
    both = {name: truth for name, truth in reference.items() if name in segmentation.classes}
    rows = score_masks("", segmentation.mask, both.items(), ct.spacing_mm)
    dice = {row.name: row.dice for row in rows if row.dice is not None}
    if not dice:
        raise UsageError(
            f"The labels show none of the model's classes ({', '.join(segmentation.classes)}). "
            f"They label: {', '.join(reference) or 'no class of universal-ct'}."
        )
    figures = []
    for name, truth in both.items():
        volumes = segmentation.volumes_ml[name], float(truth.sum()) * ct.voxel_ml
        figures += [
            Figure(f"dice/{name}", dice.get(name)),
            Figure(f"volume/{name}", volumes[0], "ml"),
            Figure(f"reference/{name}", volumes[1], "ml"),
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
        labels: See `reference_masks`.
        also: See `reference_masks`.

    Returns:
        See `compare`.

    Raises:
        UsageError: See `reference_masks` and `compare`; or the grids differ.
    """
    segmentation = model.segment(ct)
    reference = reference_masks(labels, also)
    shape = next((mask.shape for mask in reference.values()), None)
    if shape is not None and shape != segmentation.volume.shape:
        raise UsageError(
            f"{labels} has a grid of {shape} voxels, {ct} one of {segmentation.volume.shape}. "
            "Give labels on the CT's grid."
        )
    return compare(segmentation, reference)
