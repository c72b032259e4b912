"""How far each structure of a segmentation can be trusted, and whether the body lies as it should.

Everything is looked at on the network's grid, where it costs little: whether a structure was found
or lies outside of the scan; whether its volume and attenuation are usual
(`foundation.imaging.anatomy` has the ranges and their sources); and the Dice to expect.

The network's own estimate of its Dice comes from its probabilities. For a mask M and probabilities
p that were right on average, twice the sum of p in M, over the size of M plus the sum of all p,
would be the Dice to expect. They are not right on average, so the estimate is calibrated on scans
with known truth: a `Calibration` belongs to one set of weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundation.imaging.anatomy import USUAL
from foundation.imaging.expected_dice import Calibration
from foundation.imaging.frame import Frame
from foundation.imaging.probabilities import QUANTA, ProbabilityMap
from foundation.imaging.trust import Trust

FEWEST_ORGANS = 4  # whose order tells which end is up
INVERTED = -0.5  # their heights against the usual ones: a correlation below this
# By what is worth believing the place of the body is told. False masks are small, uncertain, or of
# the wrong tissue: on crops of the open CTs they made "upside down" of scans that were not.
LEAST_OWN_DICE = 0.8
LEAST_ML = 1.0
LEAST_LIVER_ML = 100.0  # a neck has false masks, too, but no liver of this size
MIRRORED_MM = 20.0  # the spleen lies on the liver's right by more than this


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
    trusts = {name: _judge(name, each, calibration) for name, each in found.items()}
    landmarks = {n: each for n, each in found.items() if _is_landmark(each, trusts[n])}
    offset = _offset_mm(landmarks)
    height_mm = (frame.shape[2] - 1) * frame.spacing_mm[2]
    for name in names:
        if name not in found:
            trusts[name] = Trust("outside" if _is_outside(name, offset, height_mm) else "not found")
    return trusts, _body_doubts(landmarks)


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
    trust = Trust("found", size, found.mean_hu, attenuation, found.own_dice)
    expected = calibration.expected(name, found.own_dice) if calibration else None
    if expected is None:
        return trust
    dice, low, high = expected
    return replace(trust, dice=dice, dice_low=low, dice_high=high)


def _against(value: float, usual: tuple[float, float], below: str, above: str) -> Any:
    return below if value < usual[0] else above if value > usual[1] else "usual"


def _is_landmark(found: _Structure, trust: Trust) -> bool:
    """Whether a structure is certain enough to tell where the body lies."""
    certain = found.own_dice >= LEAST_OWN_DICE and found.volume_ml >= LEAST_ML
    return certain and trust.attenuation != "low" and trust.attenuation != "high"


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
    doubts: list[str] = []
    liver, spleen = found.get("liver"), found.get("spleen")
    if liver is None or liver.volume_ml < LEAST_LIVER_ML:
        return doubts
    if spleen and spleen.centre_mm[0] - liver.centre_mm[0] > MIRRORED_MM:
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
        if order < INVERTED:
            doubts.append(
                "The organs lie in the reverse order from head to feet: the scan may be upside "
                "down. Check the orientation in its header."
            )
    return doubts
