"""Dice of held-out cases of a store, by the sliding window of inference."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from foundation.evaluation.metrics import dice
from foundation.imaging.volumes import VolumeWarning
from foundation.inference.predict import segment_volume
from foundation.model import UniversalModel

if TYPE_CHECKING:
    from foundation.data.store.arrays import StoredCase


def validate_case(
    model: UniversalModel,
    case: StoredCase,
    overlap: float,
    classes: Sequence[str] | None = None,
) -> dict[str, float]:
    """Dice of each class that the case annotates and that is present in it.

    classes: only of these; of all the model's if not given.

    Measured on the grid of the store, without clean-up of the masks; voxels whose label is unknown
    count for neither side.
    """
    asked = model.classes if classes is None else classes
    names = [name for name in model.classes if name in case.annotated and name in asked]
    hu = case.read_ct()
    if hu is None or not names:
        return {}
    labels = case.read_labels()
    with warnings.catch_warnings():
        # A crop without air looks like an MR; the preparation has judged the scan already.
        warnings.simplefilter("ignore", VolumeWarning)
        predicted = segment_volume(
            model,
            (hu.astype(np.float32), np.diag([*[case.spacing_mm] * 3, 1.0])),
            classes=names,
            overlap=overlap,
            postprocess=False,
            progress=False,
        )
    known = ~np.isin(labels, list(case.unknown))
    membership = case.membership(names)
    found = {}
    for channel, name in enumerate(names):
        reference = membership[:, channel][labels] & known
        value = dice(predicted.mask(name) & known, reference)
        if value is not None:
            found[name] = value
    return found


def validate(
    model: UniversalModel,
    cases: Sequence[StoredCase],
    overlap: float,
    classes: Sequence[str] | None = None,
) -> Tensor:
    """Sum and number of Dice values of each class over cases, (2, K) float64.

    Arguments as of `validate_case`; K counts all the model's classes.

    Sums, so that processes can share the cases among them and add up what they found.
    """
    totals = torch.zeros(2, len(model.classes), dtype=torch.float64)
    for case in cases:
        for name, value in validate_case(model, case, overlap, classes).items():
            channel = model.classes.index(name)
            totals[:, channel] += torch.tensor([value, 1.0], dtype=torch.float64)
    return totals


def mean_dice(totals: Tensor, classes: Sequence[str]) -> tuple[dict[str, float], float | None]:
    """Mean Dice of each class that was present, and the mean over those; None without any."""
    by_class = {
        name: float(total / count)
        for name, total, count in zip(classes, totals[0], totals[1], strict=True)
        if count > 0
    }
    return by_class, sum(by_class.values()) / len(by_class) if by_class else None
