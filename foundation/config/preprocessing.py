"""How a CT becomes a network's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foundation.config.limits import (
    MOST_CHANNELS,
    MOST_HU,
    MOST_OVERLAP,
    MOST_PATCH,
    SPACING_LIMITS_MM,
    are_numbers,
)
from foundation.errors import UsageError

Triple = tuple[float, float, float]
_AXIS_OF = {"R": "x", "L": "x", "A": "y", "P": "y", "S": "z", "I": "z"}


@dataclass(frozen=True)
class Preprocessing:
    """How a CT becomes the network's input, and logits become masks.

    Each pair of `hu_windows` gives one input channel: HU are clipped to [low, high]. They are then
    scaled to [0, 1]; where `hu_mean_std` is given, its mean is subtracted instead, and the result
    divided by its standard deviation.

    Attributes:
        orientation: Where the three axes of the input point, as NIfTI axis codes. "RAS" is to the
            right, to the front, upwards.
        spacing_mm: Size of a voxel along these axes.
        hu_windows: (low, high) of each channel, in HU.
        hu_mean_std: (mean, standard deviation) of each channel, in HU, or nothing.
        patch_size: Voxels of the sliding window along these axes.
        overlap: Share of a patch that its neighbour covers too.
        threshold: A voxel belongs to a class where its probability exceeds this.
    """

    orientation: str = "RAS"
    spacing_mm: Triple = (1.5, 1.5, 1.5)
    hu_windows: tuple[tuple[float, float], ...] = ((-175.0, 250.0),)
    hu_mean_std: tuple[tuple[float, float], ...] = ()
    patch_size: tuple[int, int, int] = (96, 96, 96)
    overlap: float = 0.5
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if sorted(_AXIS_OF.get(code, "") for code in str(self.orientation)) != ["x", "y", "z"]:
            raise UsageError(
                f"orientation is {self.orientation!r}; give three letters, one of each pair R or "
                "L, A or P, S or I: RAS, LPS, SPL."
            )
        _check_channels(self.hu_windows, self.hu_mean_std)
        low, high = SPACING_LIMITS_MM
        if not are_numbers(self.spacing_mm, 3) or not all(
            low <= size <= high for size in self.spacing_mm
        ):
            raise UsageError(
                f"spacing_mm is {self.spacing_mm}; give three numbers from {low:g} to {high:g} mm, "
                "one of each axis."
            )
        if not are_numbers(self.patch_size, 3, int) or not all(
            1 <= size <= MOST_PATCH for size in self.patch_size
        ):
            raise UsageError(
                f"patch_size is {self.patch_size}; give three whole numbers of voxels from 1 to "
                f"{MOST_PATCH}."
            )
        check_overlap(self.overlap)
        if not are_numbers((self.threshold,), 1) or not 0 < self.threshold < 1:
            raise UsageError(f"threshold is {self.threshold}; give a number between 0 and 1.")

    @property
    def channels(self) -> int:
        """Number of input channels, one for each HU window."""
        return len(self.hu_windows)


def check_overlap(overlap: float) -> None:
    """Refuse an overlap of windows at which a CT would take for ever.

    Args:
        overlap: Share of a window that its neighbour covers.

    Raises:
        UsageError: It is no number from 0 to `MOST_OVERLAP`.
    """
    if not are_numbers((overlap,), 1) or not 0 <= overlap <= MOST_OVERLAP:
        raise UsageError(
            f"overlap is {overlap!r}; give a share from 0 to {MOST_OVERLAP:g}, e.g. 0.5: windows "
            "share that much with their neighbours."
        )


def _check_channels(windows: Sequence[Any], mean_std: Sequence[Any]) -> None:
    """Refuse HU windows, or means and deviations, by which no channel can be computed."""
    if (
        not 1 <= len(windows) <= MOST_CHANNELS
        or not all(are_numbers(pair, 2) for pair in windows)
        or not all(-MOST_HU <= low < high <= MOST_HU for low, high in windows)
    ):
        raise UsageError(
            f"hu_windows is {windows!r:.200}; give 1 to {MOST_CHANNELS} pairs (low, high) of HU, "
            f"low < high, within ±{MOST_HU:g}."
        )
    if mean_std and (
        len(mean_std) != len(windows)
        or not all(are_numbers(pair, 2) for pair in mean_std)
        or not all(
            abs(mean) <= MOST_HU and 0 < deviation <= MOST_HU for mean, deviation in mean_std
        )
    ):
        raise UsageError(
            f"hu_mean_std is {mean_std!r:.200}; give (mean, deviation) in HU, a pair "
            f"for each of the {len(windows)} HU windows, with a deviation above 0."
        )
