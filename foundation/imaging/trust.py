"""How far one structure of a segmentation can be trusted, as it is kept beside the masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["found", "not found", "outside"]
TRUST_COLUMNS = ("state", "mean_hu", "dice_expected", "dice_low", "dice_high", "doubts")


@dataclass(frozen=True)
class Trust:
    """How far one structure can be trusted.

    Attributes:
        state: "outside": not found, and where it would lie the scan has ended.
        size: Its volume against the usual range; None where the border of the scan cuts it, it was
            not found, or no source gives a range.
        mean_hu: Of its mask.
        attenuation: That against the usual range.
        own_dice: The network's own estimate of its Dice, in [0, 1]; not calibrated.
        dice: The Dice to expect; None where the weights have no calibration for the class.
        dice_low, dice_high: Nine of ten structures of the calibration lay in this interval.
    """

    state: State
    size: Literal["usual", "small", "large"] | None = None
    mean_hu: float | None = None
    attenuation: Literal["usual", "low", "high"] | None = None
    own_dice: float | None = None
    dice: float | None = None
    dice_low: float | None = None
    dice_high: float | None = None

    @property
    def doubts(self) -> tuple[str, ...]:
        """What is unusual, in words; empty where nothing is."""
        found = []
        if self.size in ("small", "large"):
            found.append(f"unusually {self.size}")
        if self.attenuation in ("low", "high"):
            found.append(f"unusually {self.attenuation} attenuation ({self.mean_hu:.0f} HU)")
        return tuple(found)

    def row(self) -> list[str]:
        """Return the cells of `TRUST_COLUMNS` for a table."""
        numbers = (self.dice, self.dice_low, self.dice_high)
        return [
            self.state,
            "" if self.mean_hu is None else f"{self.mean_hu:.0f}",
            *("" if each is None else f"{each:.2f}" for each in numbers),
            "; ".join(self.doubts),
        ]
