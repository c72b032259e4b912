"""The Dice to expect of a structure, by a network's own estimate of it.

A network's probabilities are not right on average, so that its estimate, whose formula is in
`foundation.imaging.assessment`, must be held against scans with known truth. A calibration belongs
to one set of weights; it lies in their folder as `trust.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from foundation.errors import UsageError, WeightsError
from foundation.files import replacing
from foundation.settings import read, read_file

FORMAT_VERSION = 1
FEWEST_POINTS = 20  # of a class, for a level of its own
BINS = 3


@dataclass(frozen=True)
class Calibration:
    """The way from a network's own estimate to the Dice to expect.

    Attributes:
        weights_sha256: Of the weights that it belongs to.
        slope: Of the Dice by the own estimate.
        levels: Class name → what is added to that.
        edges: Expected Dice at which the intervals change.
        low, high: Of each interval: what is added to the expected Dice.
        scans: How many were measured.
        source: What they were.
    """

    weights_sha256: str
    slope: float
    levels: Mapping[str, float]
    edges: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    scans: int
    source: str

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high) or len(self.low) != len(self.edges) + 1:
            raise UsageError("A calibration has one interval more than edges between them.")

    def expected(self, name: str, own_dice: float) -> tuple[float, float, float] | None:
        """Return the Dice to expect, and its interval, all in [0, 1].

        Args:
            name: Of the class.
            own_dice: The network's own estimate.

        Returns:
            None for a class that the calibration has seen too few of.
        """
        if name not in self.levels:
            return None
        dice = self.slope * own_dice + self.levels[name]
        place = int(np.searchsorted(self.edges, dice))
        three = np.clip([dice, dice + self.low[place], dice + self.high[place]], 0, 1)
        return float(three[0]), float(three[1]), float(three[2])

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read what `write` wrote.

        Raises:
            WeightsError: The file is damaged, or of another format version.
        """
        raw = read_file(path, error=WeightsError)
        return read(cls, raw, str(path), version=FORMAT_VERSION, error=WeightsError)


def calibrate(
    names: Sequence[str],
    own_dice: ArrayLike,
    dice: ArrayLike,
    *,
    weights_sha256: str,
    scans: int,
    source: str,
) -> Calibration:
    """Fit the Dice by a network's own estimate: one slope, a level for each class.

    Args:
        names: The class of each structure, (N,).
        own_dice: The network's own estimates, (N,).
        dice: Against the truth, (N,).
        weights_sha256: Of the network.
        scans: From how many scans the structures are.
        source: What these are.

    Returns:
        The calibration. Its intervals hold nine of ten of the structures. A class with fewer than
        20 structures has no part in it.

    Raises:
        UsageError: No class has as many.
    """
    labels = np.asarray(names)
    often = [n for n in dict.fromkeys(names) if (labels == n).sum() >= FEWEST_POINTS]
    if not often:
        raise UsageError(f"No class has {FEWEST_POINTS} structures. Measure more scans.")
    own, true = np.asarray(own_dice, float), np.asarray(dice, float)
    mine = {name: np.flatnonzero(labels == name) for name in often}
    # Within classes, so that the slope is not the difference between easy and hard ones.
    x, y = (
        np.concatenate([values[rows] - values[rows].mean() for rows in mine.values()])
        for values in (own, true)
    )
    slope = float(x @ y / max(x @ x, 1e-9))
    levels = {name: float((true - slope * own)[rows].mean()) for name, rows in mine.items()}
    kept = np.concatenate([*mine.values()])
    expected = slope * own[kept] + np.array([levels[names[row]] for row in kept])
    edges = np.quantile(expected, np.linspace(0, 1, BINS + 1)[1:-1])
    place = np.searchsorted(edges, expected)
    low, high = [], []
    for index in range(BINS):
        rest = (true[kept] - expected)[place == index]
        ends = np.quantile(rest, [0.05, 0.95]) if len(rest) else (0.0, 0.0)
        low.append(float(ends[0]))
        high.append(float(ends[1]))
    return Calibration(
        weights_sha256=weights_sha256,
        slope=slope,
        levels=levels,
        edges=tuple(map(float, edges)),
        low=tuple(low),
        high=tuple(high),
        scans=scans,
        source=source,
    )
