"""How well a mask agrees with a reference; 'accuracy' would need an expert's reference."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def dice(mask: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float | None:
    """Dice coefficient of two masks of one shape, in [0, 1]; None where the reference is empty.

    A class that the reference lacks says nothing about overlap: it is skipped, as in the paper.
    """
    total = int(mask.sum()) + int(reference.sum())
    if not reference.any():
        return None
    return 2 * int((mask & reference).sum()) / total
