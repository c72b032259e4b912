"""How far each structure of a segmentation can be trusted, and whether the body lies as it should.

Everything is looked at on the network's grid, where it costs little: whether a structure was found,
lies outside of the scan or is cut by its border; whether its volume and attenuation are usual
(`foundation.imaging.anatomy` has the ranges and their sources); and the Dice to expect.

The network's own estimate of its Dice comes from its probabilities. For a mask M and probabilities
p that were right on average, twice the sum of p in M, over the size of M plus the sum of all p,
would be the Dice to expect. They are not right on average, so the estimate is calibrated on scans
with known truth: a `Calibration` belongs to one set of weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foundation.files import replacing
from foundation.imaging.anatomy import USUAL
from foundation.imaging.frame import Frame
from foundation.imaging.probabilities import QUANTA, ProbabilityMap
from foundation.settings import read, read_file

FORMAT_VERSION = 1
CALIBRATION = "trust.json"  # in the folder of the weights
FEWEST_ORGANS = 4  # whose order tells which end is up
FEWEST_POINTS = 20  # of a class, for a level of its own
MIRRORED_MM = 20.0  # the spleen lies on the liver's right by more than this
BINS = 3
State = Literal["found", "not found", "outside"]


@dataclass(frozen=True)
class Trust:
    """How far one structure can be trusted.

    Attributes:
        state: "outside": not found, and where it would lie the scan has ended.
        cut: Whether it reaches the border of the scan.
        size: Its volume against the usual range; None where it is cut, was not found, or no source
            gives a range.
        mean_hu: Of its mask.
        attenuation: That against the usual range.
        own_dice: The network's own estimate of its Dice, in [0, 1]; not calibrated.
        dice: The Dice to expect; None where the weights have no calibration.
        dice_low, dice_high: Nine of ten structures of the calibration lay in this interval.
    """

    state: State
    cut: bool = False
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
        found = ["cut by the border of the scan"] if self.cut else []
        if self.size in ("small", "large"):
            found.append(f"unusually {self.size}")
        if self.attenuation in ("low", "high"):
            found.append(f"unusually {self.attenuation} attenuation ({self.mean_hu:.0f} HU)")
        return tuple(found)


# --- calibration ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """The way from a network's own estimate to the Dice to expect.

    Attributes:
        weights_sha256: Of the weights that it belongs to.
        slope: Of the Dice by the own estimate.
        level: What is added; by class in `levels`.
        levels: Class name → level.
        edges: Expected Dice at which the intervals change.
        low, high: Of each interval: what is added to the expected Dice.
        scans: How many were measured.
        source: What they were.
    """

    weights_sha256: str
    slope: float
    level: float
    levels: Mapping[str, float]
    edges: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    scans: int
    source: str

    def expected(self, name: str, own_dice: float) -> tuple[float, float, float]:
        """Return the Dice to expect, and its interval, all in [0, 1]."""
        dice = self.slope * own_dice + self.levels.get(name, self.level)
        place = int(np.searchsorted(self.edges, dice))
        three = np.clip([dice, dice + self.low[place], dice + self.high[place]], 0, 1)
        return float(three[0]), float(three[1]), float(three[2])

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        import json

        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read what `write` wrote.

        Raises:
            UsageError: The file is damaged, or of another format version.
        """
        return read(cls, read_file(path), str(path), version=FORMAT_VERSION)


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
        The calibration. Its intervals hold nine of ten of the structures.
    """
    own, true = np.asarray(own_dice, float), np.asarray(dice, float)
    labels = np.asarray(names)
    often = [n for n in dict.fromkeys(names) if (labels == n).sum() >= FEWEST_POINTS]
    groups = np.array([often.index(n) if n in often else -1 for n in names])
    # Within classes, so that the slope is not the difference between easy and hard ones.
    centred = [(own, true)] if not often else []
    for index in range(len(often)):
        mine = groups == index
        centred.append((own[mine] - own[mine].mean(), true[mine] - true[mine].mean()))
    x, y = (np.concatenate(each) for each in zip(*centred, strict=True))
    slope = float(x @ y / max(x @ x, 1e-9))
    level = float((true - slope * own).mean())
    levels = {
        name: float((true - slope * own)[groups == index].mean())
        for index, name in enumerate(often)
    }
    expected = slope * own + np.array([levels.get(n, level) for n in names])
    edges = np.quantile(expected, np.linspace(0, 1, BINS + 1)[1:-1])
    place = np.searchsorted(edges, expected)
    low, high = [], []
    for index in range(BINS):
        rest = (true - expected)[place == index]
        ends = np.quantile(rest, [0.05, 0.95]) if len(rest) else (0.0, 0.0)
        low.append(float(ends[0]))
        high.append(float(ends[1]))
    return Calibration(
        weights_sha256,
        slope,
        level,
        levels,
        tuple(map(float, edges)),
        tuple(low),
        tuple(high),
        scans,
        source,
    )


# --- one scan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Structure:
    """What is measured of one mask on the network's grid."""

    volume_ml: float
    mean_hu: float
    own_dice: float
    centre_mm: NDArray[np.float64]
    cut: bool


def assess(
    maps: Mapping[str, ProbabilityMap],
    names: Sequence[str],
    hu: NDArray[np.float32],
    frame: Frame,
    threshold: float,
    calibration: Calibration | None = None,
) -> tuple[dict[str, Trust], list[str]]:
    """Tell how far each structure of a scan can be trusted, and what is odd about the body.

    Args:
        maps: Class name → probabilities on the network's grid, after the post-processing.
        names: The classes that were asked for.
        hu: The CT (X, Y, Z) on the network's grid, RAS.
        frame: Of the network's grid.
        threshold: A voxel belongs to a class where its probability exceeds this.
        calibration: Of the network's weights; without it no Dice is expected.

    Returns:
        Class name → trust, and doubts about the whole scan, in sentences.
    """
    found = {
        name: each
        for name in names
        if name in maps and (each := _measure(maps[name], hu, frame, threshold)) is not None
    }
    offset = _offset_mm(found)
    height_mm = (frame.shape[2] - 1) * frame.spacing_mm[2]
    trusts = {}
    for name in names:
        if name in found:
            trusts[name] = _judge(name, found[name], calibration)
        else:
            trusts[name] = Trust("outside" if _is_outside(name, offset, height_mm) else "not found")
    return trusts, _body_doubts(found)


def _measure(
    found: ProbabilityMap, hu: NDArray[np.float32], frame: Frame, threshold: float
) -> _Structure | None:
    mask = found.values > threshold * QUANTA
    voxels = int(mask.sum())
    if not voxels:
        return None
    spacing_mm, start = np.asarray(frame.spacing_mm), np.asarray(found.start)
    profiles = [mask.sum(axis=others) for others in ((1, 2), (0, 2), (0, 1))]
    centre = np.array([profile @ np.arange(len(profile)) / voxels for profile in profiles])
    low = start + [int(np.flatnonzero(profile)[0]) for profile in profiles]
    high = start + [int(np.flatnonzero(profile)[-1]) for profile in profiles]
    inside, everywhere = int(found.values[mask].sum()), int(found.values.sum())
    return _Structure(
        voxels * float(spacing_mm.prod()) / 1000,
        float(hu[found.box][mask].mean()),
        2 * inside / (voxels * QUANTA + everywhere),
        (start + centre) * spacing_mm,
        bool((low <= 0).any() or (high >= np.asarray(frame.shape) - 1).any()),
    )


def _judge(name: str, found: _Structure, calibration: Calibration | None) -> Trust:
    usual = USUAL.get(name)
    size = attenuation = None
    if usual and usual.volume_ml and not found.cut:
        size = _against(found.volume_ml, usual.volume_ml, "small", "large")
    if usual and usual.mean_hu:
        attenuation = _against(found.mean_hu, usual.mean_hu, "low", "high")
    trust = Trust("found", found.cut, size, found.mean_hu, attenuation, found.own_dice)
    if calibration is None:
        return trust
    dice, low, high = calibration.expected(name, found.own_dice)
    return replace(trust, dice=dice, dice_low=low, dice_high=high)


def _against(value: float, usual: tuple[float, float], below: str, above: str) -> Any:
    return below if value < usual[0] else above if value > usual[1] else "usual"


def _offset_mm(found: Mapping[str, _Structure]) -> float | None:
    """Where along the body the centre of the liver lies, or would lie, by all that was found."""
    places = {name: z for name in found if (z := _place(name)) is not None}
    whole = {name: z for name, z in places.items() if not found[name].cut} or places
    if not whole:
        return None
    return float(np.median([found[name].centre_mm[2] - z for name, z in whole.items()]))


def _place(name: str) -> float | None:
    usual = USUAL.get(name)
    return usual.z_mm if usual else None


def _is_outside(name: str, offset: float | None, height_mm: float) -> bool:
    """Whether less than a quarter of an organ would lie within the scan."""
    usual = USUAL.get(name)
    if offset is None or usual is None or usual.z_mm is None:
        return False
    centre = offset + usual.z_mm
    return centre + usual.half_mm / 2 < 0 or centre - usual.half_mm / 2 > height_mm


def _body_doubts(found: Mapping[str, _Structure]) -> list[str]:
    """Whether left and right, or head and feet, seem to be exchanged."""
    doubts = []
    liver, spleen = found.get("liver"), found.get("spleen")
    if liver and spleen and spleen.centre_mm[0] - liver.centre_mm[0] > MIRRORED_MM:
        doubts.append(
            "The spleen lies on the right of the liver: left and right may be exchanged in the "
            "header, or the organs of this person lie mirrored."
        )
    places = {name: z for name in found if (z := _place(name)) is not None}
    if len(places) >= FEWEST_ORGANS:
        seen = [found[name].centre_mm[2] for name in places]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # all at one height
            order = np.corrcoef(seen, list(places.values()))[0, 1]
        if order < 0:
            doubts.append(
                "The organs lie in the reverse order from head to feet: the scan may be upside "
                "down. Check the orientation in its header."
            )
    return doubts
