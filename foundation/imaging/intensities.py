"""Whether the numbers of a volume are HU of a person: by their histogram, with the likely fault.

A CT of a person has soft tissue and fat between about -150 and 150 HU, air near -1000, next to
nothing beyond 3000, and neighbours that resemble each other. What was scaled, shifted or turned
round lacks one of these; the first change that brings them back names the fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HIGHEST_AIR_HU = -500.0  # anything above is tissue; a CT of a person shows air somewhere
CLIPPED_SHARE = 0.005  # of the voxels at the very minimum and at the very maximum
CLIPPED_BELOW_HU = 240.0  # a CT cut off at 250, the usual window of soft tissue, still serves

_SAMPLE = 300_000  # voxels that are looked at
_LIMIT = 34_000  # HU; beyond, voxels count as at the limit
_WIDTH = 25  # HU over which a peak is summed up
_AIR = (-1100, -700)  # where the peak of air, or of lung without it, may lie
_TISSUE = (-150, 200)  # where there must be voxels …
_TISSUE_PEAK = (-130, 170)  # … and where their peak may lie
_BODY_SHARE = 0.001  # of the voxels at least are soft tissue: a wrist in a wide field of view
_NO_LUNG_SHARE = 0.2  # of the voxels in one peak are no lung, which is of many densities, but air …
_HIGHEST_OPEN_AIR = -870  # … that lies below this
_REPAIRED_AIR_SHARE = 0.01  # a change that brings back less air or soft tissue explains nothing
_INVERTED_BONE_HU = -150  # of a CT with an inverted sign, bone at least lies below
_REPAIRED_BODY_SHARE = 0.05
_REPAIRED_BONE_SHARE = 0.05  # … at most
_PEAK_SHARE = 0.05  # of the voxels in a peak that stands where none may be
_TISSUE_PEAK_SHARE = 0.1  # … of tissue: a vessel full of contrast may fill a small scan
_TISSUE_PEAK_RATIO = 5  # … beside less soft tissue than that
_BEYOND_SHARE = 0.01  # of the voxels at most lie above 3000 HU
_DEEP_SHARE = 0.02  # … and at most below -1200, beside padding
_SAME_SHARE = 0.995  # of the voxels at most have one value
_PADDED_SHARE = 0.3  # around a round field of view, padding is at most 22 %
_PADDING_SHARE = 0.0005  # of the voxels at least have a value that is padding
_LEAST_LIKENESS = 0.2  # correlation of neighbours along the first axis
_FEWEST = 4096  # voxels below which a histogram says nothing
_REPAIRS: tuple[tuple[str, float, float], ...] = (
    ("an intercept of -1024 that was applied twice", 1.0, 1024.0),
    ("HU times ten", 0.1, 0.0),
    ("an inverted sign", -1.0, 0.0),
    ("a missing intercept of -1024", 1.0, -1024.0),
)


@dataclass(frozen=True)
class Sample:
    """Some voxels of a volume, spread evenly over it.

    Attributes:
        values: HU, (N,).
        neighbours: HU of the next voxel of each along the first axis, (N,).
        low: The smallest of all voxels, HU.
        high: The largest.
    """

    values: NDArray[np.float32]
    neighbours: NDArray[np.float32]
    low: float
    high: float


def sample_of(volume: Any, low: float, high: float) -> Sample:
    """Draw every n-th voxel along each axis, and its neighbour.

    Args:
        volume: A `Volume`.
        low: Its smallest value, HU.
        high: Its largest.

    Returns:
        At most some 300,000 voxels.
    """
    step = max(1, round((np.prod(volume.shape, dtype=float) / _SAMPLE) ** (1 / 3)))
    first, second = (
        volume.hu((slice(start, stop, step), slice(None, None, step), slice(None, None, step)))
        for start, stop in ((0, -1), (1, None))
    )
    return Sample(first.ravel(), second.ravel(), low, high)


def doubt_about(sample: Sample) -> str:
    """Say why intensities may not be HU.

    Args:
        sample: Of the volume.

    Returns:
        A sentence; "" if they look like a CT.
    """
    low, high = sample.low, sample.high
    if low > HIGHEST_AIR_HU:
        return _without_air(sample)
    if len(sample.values) < _FEWEST:
        return ""
    if _likeness(sample) < _LEAST_LIKENESS:
        return (
            "neighbouring voxels do not resemble each other: noise, or voxels read with another "
            "type or shape than they were written with."
        )
    found = _Histogram.of(sample.values)
    if found.padded_mr:
        return "nothing lies between air and water: an MR that was padded with -1000."
    if reason := found.fault():
        return f"{reason}: {_cause(sample) or 'not HU, or no CT of a body'}."
    clipped = float(np.mean(sample.values == high))
    # Below the cut the body's other tissue goes on; where it does not, the body is of one piece.
    if high < CLIPPED_BELOW_HU and CLIPPED_SHARE <= clipped < found.share(high - 200, high) / 2:
        return f"intensities end at {high:g} with many voxels there: bone and contrast are cut off."
    return ""


def _without_air(sample: Sample) -> str:
    low, high = sample.low, sample.high
    run = f"intensities run from {low:g} to {high:g}"
    if low >= 0 and high <= 1.001:
        return f"{run}: already windowed and scaled to [0, 1], not HU."
    if low >= 0 and high <= 255.001:
        return f"{run}: already windowed to 8 bits, not HU."
    clipped = min(np.mean(sample.values == low), np.mean(sample.values == high))
    if clipped >= CLIPPED_SHARE:
        return f"{run}, with many voxels at either end: already windowed, not full HU."
    if low >= 0:
        return f"{run}, never negative: an MR, or a CT stored without its intercept of -1024."
    known = len(sample.values) >= _FEWEST and _Histogram.of(sample.values).fault()
    cause = _cause(sample) if known else ""
    return f"{run}, without any air: {cause or 'an MR, or a crop from inside the body'}."


def _cause(sample: Sample) -> str:
    """What may have happened to a CT of a body, so that it now has these intensities."""
    for cause, slope, intercept in _REPAIRS:
        if slope < 0 and sample.low > _INVERTED_BONE_HU:
            continue  # air and tissue of a CT without its intercept look alike either way
        repaired = _Histogram.of(sample.values * np.float32(slope) + np.float32(intercept))
        if repaired.is_a_body and not repaired.fault():
            return cause
    return ""


def _likeness(sample: Sample) -> float:
    """Correlation of neighbouring voxels; 1 where all are alike."""
    difference = sample.values.astype(np.float64) - sample.neighbours
    variance = float(np.var(sample.values, dtype=np.float64))
    return 1 - float(np.mean(difference**2)) / (2 * variance) if variance else 1.0


@dataclass(frozen=True)
class _Histogram:
    """Voxels of each whole HU from -_LIMIT on, without padding, and how many there are."""

    counts: NDArray[np.int64]
    padding: tuple[int, ...]
    padded: float  # share of padding below -1200 HU
    total: int

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> _Histogram:
        whole = np.rint(values).clip(-_LIMIT, _LIMIT).astype(np.int64) + _LIMIT
        counts = np.bincount(whole, minlength=2 * _LIMIT + 1)
        padding = _padding(counts)
        padded = sum(int(counts[value + _LIMIT]) for value in padding if value < -1200)
        counts[[value + _LIMIT for value in padding]] = 0
        return cls(counts, padding, padded / len(values), len(values))

    @property
    def rest(self) -> int:
        """Voxels beside padding."""
        return max(1, int(self.counts.sum()))

    @property
    def is_a_body(self) -> bool:
        """Whether there is soft tissue, some air or what stands for it, and not too much bone."""
        padded = any(_AIR[0] <= value <= _AIR[1] for value in self.padding)
        air = padded or self.share(*_AIR) >= _REPAIRED_AIR_SHARE
        bone = self.share(700, _LIMIT) <= _REPAIRED_BONE_SHARE
        return air and bone and self.share(*_TISSUE) >= _REPAIRED_BODY_SHARE

    @property
    def padded_mr(self) -> bool:
        """Whether nothing lies between air and water, where a body has fat, lung and rims."""
        inside = self.share(-890, _LIMIT)
        return self.share(-890, -20) < 0.002 * inside and self.share(150, 3000) > 0.2 * inside

    def share(self, low: float, high: float) -> float:
        """The share of the voxels, without padding, from `low` to `high` HU."""
        return float(self._part(low, high).sum()) / self.rest

    def peak(self, low: float, high: float) -> tuple[int, float]:
        """The middle of the fullest _WIDTH HU from `low` to `high`, and their share."""
        part = self._part(low, max(low + _WIDTH, high))
        sums = np.convolve(part, np.ones(_WIDTH, np.int64), "same")
        at = int(sums.argmax())
        return int(low) + at, float(sums[at]) / self.rest

    def fault(self) -> str:
        """What is not as in a CT of a person; "" if all is."""
        if self.share(3000, _LIMIT) > _BEYOND_SHARE:
            share = self.share(3000, _LIMIT)
            return f"{share:.0%} of the voxels lie above 3000 HU"
        value = int(self.counts.argmax()) - _LIMIT
        if self.rest <= (1 - _SAME_SHARE) * self.total:
            return f"nearly every voxel is {self.padding[-1]}"
        if self.counts[value + _LIMIT] >= _SAME_SHARE * self.rest:
            return f"nearly every voxel is {value}"
        at, share = self.peak(-_LIMIT, -300)
        highest = _AIR[1] if share < _NO_LUNG_SHARE else _HIGHEST_OPEN_AIR
        if share > _PEAK_SHARE and not _AIR[0] <= at <= highest:
            return f"air lies near {at} HU in place of -1000"
        if self.padded > _PADDED_SHARE and self.share(-1100, -900) < _BODY_SHARE:
            return f"{self.padded:.0%} of the voxels are padding, and none is air"
        if self.share(-_LIMIT, -1200) > _DEEP_SHARE:
            return f"{self.share(-_LIMIT, -1200):.0%} of the voxels lie below -1200 HU"
        at, share = self.peak(600, _LIMIT)
        if share > _PEAK_SHARE:
            return f"{share:.0%} of the voxels lie near {at} HU, where a body has little"
        return self._tissue_fault()

    def _tissue_fault(self) -> str:
        tissue = self.share(*_TISSUE)
        if tissue < _BODY_SHARE:
            return f"no body was found: {tissue:.2%} of the voxels are soft tissue"
        # Voxels at the very end of the scale are no peak: all that was brighter lies there.
        last = int(np.flatnonzero(self.counts)[-1]) - _LIMIT - 1
        at, share = self.peak(-280, min(700, last))
        _, inside = self.peak(*_TISSUE_PEAK)
        if share > max(_TISSUE_PEAK_SHARE, _TISSUE_PEAK_RATIO * inside):
            return f"soft tissue lies near {at} HU in place of -120 to 150"
        return ""

    def _part(self, low: float, high: float) -> NDArray[np.int64]:
        return self.counts[int(low) + _LIMIT : int(high) + _LIMIT + 1]


def _padding(counts: NDArray[np.int64]) -> tuple[int, ...]:
    """Values below air that stand alone, as around a round field of view: -1024, -2000, -3024 …

    Padding is put where nothing was measured, so that no voxel has nearly the same value.
    """
    end = _LIMIT - 1010
    total = int(counts.sum())
    found = []
    for at in np.flatnonzero(counts[:end] >= max(2, _PADDING_SHARE * total)):
        around = int(counts[max(0, at - 10) : at + 11].sum())
        if counts[at] >= 0.5 * around:
            found.append(int(at) - _LIMIT)
    return tuple(found)
