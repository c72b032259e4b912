"""Means over scans and classes, how sure they are, and how sure a difference of two is.

Scans are the units that are drawn: the classes of one scan fail together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from foundation.errors import UsageError

FEWEST_CASES = 3  # for an interval: fewer say nothing of the scatter between scans
DRAWS = 2000
POWER = 0.8
Interval = tuple[float, float] | None


def mean_of(table: NDArray[np.float64]) -> float | None:
    """Compute the mean over rows, then over columns, of what is no NaN; None where all is."""
    return _means(table[None])[0]


def bootstrap(
    values: Sequence[float] | NDArray[np.float64], confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Estimate the interval in which the mean lies, by drawing scans anew, with replacement.

    Classes of one scan are drawn together, since they fail together.

    Args:
        values: (N,), or (N, classes) with NaN where a scan does not show a class; then the mean
            over classes of the means over scans is meant.
        confidence: Probability that the interval holds the mean.
        seed: Of the draws.

    Returns:
        Its two ends; None for fewer than three scans, of which it would be made up.
    """
    table = np.asarray(values, dtype=float)
    table = table[:, None] if table.ndim == 1 else table
    table = table[~np.isnan(table).all(axis=1)]
    if len(table) < FEWEST_CASES:
        return None
    return _ends(_drawn_means(table[None], seed), confidence)


def bootstrap_ratio(
    parts: Sequence[float], wholes: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Estimate the interval of a share whose counts come from several scans, by drawing scans.

    Args:
        parts: What was counted in each scan, such as lesions that were found.
        wholes: Of how many in each, at least one.
        confidence: Probability that the interval holds the share.
        seed: Of the draws.

    Returns:
        Its two ends; None for fewer than three scans.
    """
    if len(wholes) < FEWEST_CASES:
        return None
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(wholes), size=(DRAWS, len(wholes)))
    part, whole = (np.asarray(each, float)[drawn].sum(axis=1) for each in (parts, wholes))
    return _ends((part / whole).tolist(), confidence)


def wilson(hits: int, trials: int, confidence: float = 0.95) -> Interval:
    """Estimate the interval of a share, such as a sensitivity.

    Args:
        hits: How often it was so.
        trials: Of how many.
        confidence: Probability that the interval holds the share.

    Returns:
        Its two ends in [0, 1]; None without a trial.

    Reference: Wilson, 1927, Journal of the American Statistical Association 22, 209-212.
    """
    if not trials:
        return None
    z = float(stats.norm.ppf((1 + confidence) / 2))
    share, squared = hits / trials, z**2 / trials
    middle = (share + squared / 2) / (1 + squared)
    half = z * np.sqrt(share * (1 - share) / trials + squared / trials / 4) / (1 + squared)
    # At 0 and 1 one end is exactly that, but for rounding.
    low = 0.0 if hits == 0 else float(middle - half)
    high = 1.0 if hits == trials else float(middle + half)
    return low, high


@dataclass(frozen=True)
class Difference:
    """How two arms differ, measured on the same scans.

    Attributes:
        mean: Of the first less the second; above 0, the first is higher. None without a pair.
        interval: In which it lies with 95 % confidence; None for fewer than three pairs.
        smallest: The smallest difference that such a run would have found with a power of 80 %, at
            5 % on two sides: (t₀.₉₇₅ + t₀.₈) standard errors of the difference, with N - 1 degrees
            of freedom. None for fewer than three pairs. Reference: Bloom, 1995, "Minimum detectable
            effects", Evaluation Review 19, 547-556.
        first, second: Means of the two arms over the pairs.
        pairs: Scans that both arms have.
        seeds: Trainings of each arm.
    """

    mean: float | None
    interval: Interval
    smallest: float | None
    first: float | None
    second: float | None
    pairs: int
    seeds: int = 1

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def paired_bootstrap(
    values_a: ArrayLike, values_b: ArrayLike, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Compare two arms that were measured on the same scans.

    With several seeds, seeds and scans are both drawn anew, independently of each other: the
    interval then also holds what another training would have given. The n-th seed of one arm is
    paired with the n-th of the other.

    Args:
        values_a: (N,), a value a scan; (N, classes), a value a scan and class; or (seeds, N,
            classes). NaN where there is none; what one arm lacks is left out of both.
        values_b: Of the other arm, of the same shape.
        confidence: Of the interval.
        seed: Of the draws.

    Returns:
        The difference, first less second.

    Raises:
        UsageError: The shapes differ, or have other than one to three axes.

    Reference for drawing along both axes: Owen, 2007, "The pigeonhole bootstrap", Annals of Applied
        Statistics 1, 386-411.
    """
    a, b = (_three_axes(values) for values in (values_a, values_b))
    if a.shape != b.shape:
        raise UsageError(
            f"The two arms have shapes {a.shape} and {b.shape}; give the same scans of both, in "
            "the same order."
        )
    lost = np.isnan(a) | np.isnan(b)
    a, b = (np.where(lost, np.nan, arm) for arm in (a, b))
    there = ~lost.all(axis=(0, 2))
    a, b = a[:, there], b[:, there]
    seeds, pairs = a.shape[:2]
    first, second, mean = (_mean_over(each) for each in (a, b, a - b))
    # Fewer units make both too small: t corrects the power, the root the standard error.
    units = pairs if seeds == 1 else min(seeds, pairs)
    if pairs < FEWEST_CASES:
        return Difference(mean, None, None, first, second, pairs, seeds)
    drawn = _drawn_means(a - b, seed)
    smallest = None
    if units > 1:
        error = float(np.std(drawn)) * np.sqrt(units / (units - 1))
        needed = stats.t.ppf((1 + confidence) / 2, units - 1) + stats.t.ppf(POWER, units - 1)
        smallest = float(needed * error)
    return Difference(mean, _ends(drawn, confidence), smallest, first, second, pairs, seeds)


def _three_axes(values: ArrayLike) -> NDArray[np.float64]:
    """As (seeds, N, classes)."""
    table = np.asarray(values, dtype=float)
    if not 1 <= table.ndim <= 3:
        raise UsageError(
            f"The values of an arm have {table.ndim} axes; give (N,), (N, classes) or (seeds, N, "
            "classes)."
        )
    if table.ndim == 1:
        table = table[:, None]
    return table[None] if table.ndim == 2 else table


def _mean_over(values: NDArray[np.float64]) -> float | None:
    """The mean over seeds and scans, then over classes."""
    return mean_of(values.reshape(-1, values.shape[2]))


def _drawn_means(values: NDArray[np.float64], seed: int) -> list[float]:
    """Means of DRAWS tables that are drawn of (seeds, N, classes), with replacement."""
    seeds, count, _ = values.shape
    rng = np.random.default_rng(seed)
    scans = rng.integers(count, size=(DRAWS, count))
    if seeds == 1:
        found = _means(values[0][scans])
    else:
        trained = rng.integers(seeds, size=(DRAWS, seeds))
        tables = (values[chosen][:, rows] for chosen, rows in zip(trained, scans, strict=True))
        found = [_mean_over(table) for table in tables]
    return [mean for mean in found if mean is not None]


def _ends(means: Sequence[float], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _means(tables: NDArray[np.float64]) -> list[float | None]:
    """As `mean_of`, for tables (T, N, classes)."""
    there = ~np.isnan(tables)
    seen = there.sum(axis=1)
    by_class = np.nansum(tables, axis=1) / np.maximum(seen, 1)
    classes = (seen > 0).sum(axis=1)
    means = np.where(seen > 0, by_class, 0).sum(axis=1) / np.maximum(classes, 1)
    return [float(mean) if n else None for mean, n in zip(means, classes, strict=True)]
