"""How far a tuning left old classes alone in scans that do not label them.

There is no reference, so the masks of the tuned model are compared with those that the model gave
before. This is agreement, not accuracy: 1 says that nothing changed, be it right or wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foundation.data.store.arrays import StoredCase
from foundation.evaluation.metrics import dice, surface_dice
from foundation.evaluation.scores import Score, Scores
from foundation.evaluation.scoring import read_masks

CHANGED = 0.95  # a Dice agreement below this is marked
NOT_COMPARED: Scores = Scores((), 0.0, 0.0)


def agreement(
    before: Path,
    after: Path,
    cases: Sequence[StoredCase],
    classes: Sequence[str],
    tolerance_mm: float,
) -> Scores:
    """Compare the masks after a tuning with those before it: Dice and surface Dice of each class.

    Args:
        before: The folder in which `evaluate` kept the masks of the model before.
        after: That of the tuned model.
        cases: The scans.
        classes: The classes whose masks were kept.
        tolerance_mm: Of the surface Dice.

    Returns:
        A row for each class of each scan that does not label it and in which one of the two models
        sees it.
    """
    rows = []
    for case in cases:
        for name in classes:
            if name in case.annotated:
                continue
            masks = [read_masks(folder, case, [name]).get(name) for folder in (before, after)]
            first, then = masks
            if first is not None and then is not None and (first.any() or then.any()):
                overlap, surface = _agree(then, first, case.spacing_mm, tolerance_mm)
                rows.append(Score(case.key, name, overlap, surface))
    return Scores(tuple(rows), tolerance_mm, cases[0].spacing_mm)


def _agree(
    mask: NDArray[np.bool_], before: NDArray[np.bool_], spacing_mm: float, tolerance_mm: float
) -> tuple[float, float]:
    if np.array_equal(mask, before):  # as with a frozen network: no distances are needed
        return 1.0, 1.0
    # None: the model saw nothing before. What it sees now is all new, and agrees with nothing.
    surface = surface_dice(mask, before, [spacing_mm] * 3, tolerance_mm)
    return dice(mask, before) or 0.0, surface or 0.0


def changed(scores: Scores) -> list[str]:
    """Return the classes whose mean Dice agreement is below CHANGED, in the order of the rows."""
    return [name for name in scores.classes if (scores.mean([name]) or 0.0) < CHANGED]


def summary(scores: Scores) -> dict[str, dict[str, float | int | None]]:
    """Return class → Dice and surface Dice agreement, and number of scans, as plain data."""
    return {
        name: {
            "dice": scores.mean([name]),
            "nsd": scores.mean([name], "nsd"),
            "scans": len(scores.by_case([name])),
        }
        for name in scores.classes
    }
