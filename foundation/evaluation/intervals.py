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
DRAWN_VALUES = 1 << 24  # at a time, so that a thousand scans of a hundred classes fit into memory
POWER = 0.8
Interval = tuple[float, float] | None


def mean_of(table: NDArray[np.float64]) -> float | None:
    """Compute the mean over rows, then over columns, of what is no NaN; None where all is."""
    seen = (~np.isnan(table)).sum(axis=0)
    if not seen.any():
        return None
    return float((np.nansum(table, axis=0)[seen > 0] / seen[seen > 0]).mean())


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
            5 % on two sides: (t₀.₉₇₅ + t₀.₈) standard errors of the difference. None for fewer than
            three pairs. Reference: Bloom, 1995, "Minimum detectable effects", Evaluation Review 19,
            547-556.
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
    paired with the n-th of the other. Few seeds are drawn too alike, so that quantiles of the draws
    would be far too narrow. The interval is then by Student's t, with the standard error of the
    draws, corrected for the number of units, and Satterthwaite's degrees of freedom. For three
    seeds and 24 scans, it held the true difference in 93 to 99 % of simulated comparisons.

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
        Statistics 1, 386-411. For the degrees of freedom: Satterthwaite, 1946, Biometrics Bulletin
        2, 110-114.
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
    if pairs < FEWEST_CASES or mean is None:
        return Difference(mean, None, None, first, second, pairs, seeds)
    drawn = _drawn_means(a - b, seed)
    units = pairs if seeds == 1 else min(seeds, pairs)
    error = float(np.std(drawn) * np.sqrt(units / (units - 1)))
    freedom = pairs - 1 if seeds == 1 else _freedom(np.nanmean(a - b, axis=2))
    likely = float(stats.t.ppf((1 + confidence) / 2, freedom))
    smallest = (likely + float(stats.t.ppf(POWER, freedom))) * error
    interval = _ends(drawn, confidence)
    if seeds > 1:
        interval = mean - likely * error, mean + likely * error
    return Difference(mean, interval, smallest, first, second, pairs, seeds)


def _freedom(values: NDArray[np.float64]) -> float:
    """Satterthwaite's degrees of freedom of the mean of (seeds, N), both axes being chance."""
    seeds, count = values.shape
    least = float(min(seeds, count) - 1)
    values = np.where(np.isnan(values), np.nanmean(values), values)
    mean, rows, columns = values.mean(), values.mean(axis=1), values.mean(axis=0)
    rest = values - rows[:, None] - columns[None] + mean
    parts = (  # mean square, degrees of freedom
        (count * ((rows - mean) ** 2).sum() / (seeds - 1), seeds - 1),
        (seeds * ((columns - mean) ** 2).sum() / (count - 1), count - 1),
        (-(rest**2).sum() / ((seeds - 1) * (count - 1)), (seeds - 1) * (count - 1)),
    )
    below = sum(square**2 / freedom for square, freedom in parts)
    total = sum(square for square, _ in parts)
    return max(least, float(total**2 / below)) if below and total > 0 else least


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
    seeds, count, classes = values.shape
    rng = np.random.default_rng(seed)
    scans = _times(rng.integers(count, size=(DRAWS, count)), count)
    trained = np.ones((DRAWS, 1))
    if seeds > 1:
        trained = _times(rng.integers(seeds, size=(DRAWS, seeds)), seeds)
    there = ~np.isnan(values)
    known = np.where(there, values, 0.0)
    step = max(1, DRAWN_VALUES // max(1, count * classes))
    means: list[float] = []
    for first in range(0, DRAWS, step):
        part = slice(first, first + step)
        sums, seen = (
            np.einsum("ds,dn,snc->dc", trained[part], scans[part], each, optimize=True)
            for each in (known, there.astype(float))
        )
        shown = (seen > 0).sum(axis=1)
        totals = np.where(seen > 0, sums / np.maximum(seen, 1), 0.0).sum(axis=1)
        means += (totals[shown > 0] / shown[shown > 0]).tolist()
    return means


def _times(drawn: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """How often each of `count` units is in each row of draws."""
    times = np.zeros((len(drawn), count))
    np.add.at(times, (np.arange(len(drawn))[:, None], drawn), 1)
    return times


def _ends(means: Sequence[float], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
