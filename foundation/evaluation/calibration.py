"""Whether probabilities are what they say: of the voxels with 0.8, do 80 % belong to the class?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foundation.errors import UsageError
from foundation.evaluation.metrics import Mask
from foundation.imaging.frame import bounding_box

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Counts of voxels by the probability that the model gave them; of one class.

    Those of several scans add up: `a + b`.

    Attributes:
        voxels: (B,) of each bin; the bins divide [0, 1] equally.
        probability: (B,) sum of the probabilities of these voxels.
        hits: (B,) how many of them belong to the class.
        squares: Sum over all voxels of (probability - belongs)².
    """

    voxels: NDArray[np.int64]
    probability: NDArray[np.float64]
    hits: NDArray[np.int64]
    squares: float

    def __add__(self, other: Calibration) -> Calibration:
        if len(self.voxels) != len(other.voxels):
            raise UsageError(f"{len(self.voxels)} and {len(other.voxels)} bins do not add up.")
        return Calibration(
            self.voxels + other.voxels,
            self.probability + other.probability,
            self.hits + other.hits,
            self.squares + other.squares,
        )

    @property
    def ece(self) -> float | None:
        """Expected calibration error, in [0, 1]; None without a voxel.

        Reference: Guo et al., 2017 (arXiv 1706.04599), equation 3, with the probability of the
        class in place of the confidence of the prediction.
        """
        total = int(self.voxels.sum())
        return float(np.abs(self.probability - self.hits).sum() / total) if total else None

    @property
    def brier(self) -> float | None:
        """Mean of (probability - belongs)², in [0, 1]; None without a voxel."""
        total = int(self.voxels.sum())
        return self.squares / total if total else None

    @property
    def bins(self) -> list[tuple[float, float, int]]:
        """Of each bin with voxels: mean probability, share that belongs to the class, voxels."""
        return [
            (float(p / n), float(h / n), int(n))
            for p, h, n in zip(self.probability, self.hits, self.voxels, strict=True)
            if n
        ]


def calibration(
    probability: NDArray[np.floating], reference: Mask, where: Mask | None = None, bins: int = BINS
) -> Calibration:
    """Count the voxels of one scan by the probability of a class.

    Air far from an organ is right at probability 0 in every scan, and would make any model look
    calibrated. So only voxels in the box around the reference and all of the model's probabilities
    above 0 count, unless `where` says otherwise.

    Args:
        probability: Of the class (X, Y, Z), in [0, 1].
        reference: Of the same shape, bool.
        where: Voxels that count, of the same shape.
        bins: How many there are.

    Returns:
        The counts.

    Raises:
        UsageError: The shapes differ, or a probability is outside [0, 1].
    """
    if probability.shape != reference.shape or (
        where is not None and where.shape != reference.shape
    ):
        raise UsageError(
            f"The probabilities have shape {probability.shape}, the reference {reference.shape}."
        )
    if where is None:
        box = bounding_box((probability > 0) | reference)
        values, belongs = (probability[box], reference[box]) if box else (np.zeros(0), np.zeros(0))
    else:
        values, belongs = probability[where], reference[where]
    p, hit = values.ravel().astype(float), belongs.ravel().astype(bool)
    if len(p) and not (p.min() >= 0 and p.max() <= 1):
        raise UsageError(f"Probabilities run from {p.min():g} to {p.max():g}; allowed is [0, 1].")
    number = np.minimum((p * bins).astype(int), bins - 1)
    return Calibration(
        np.bincount(number, minlength=bins),
        np.bincount(number, p, bins).astype(float),
        np.bincount(number[hit], minlength=bins),
        float(((p - hit) ** 2).sum()),
    )
