"""How far a structure is trusted: by its place, its size, its HU and the network's own doubt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foundation.config import Preprocessing
from foundation.imaging.anatomy import USUAL
from foundation.imaging.assessment import assess
from foundation.imaging.expected_dice import Calibration, calibrate
from foundation.imaging.frame import Frame
from foundation.imaging.preprocess import frame_of
from foundation.imaging.probabilities import ProbabilityMap
from foundation.imaging.volumes import read_ct
from foundation.taxonomy import NAMES

SHAPE, MM = (60, 40, 90), 5.0  # a trunk of 30 × 20 × 45 cm


@pytest.fixture
def frame() -> Frame:
    volume = read_ct((np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) % 500 - 600,
                      np.diag([MM, MM, MM, 1.0])))  # fmt: skip
    return frame_of(volume, Preprocessing(spacing_mm=(MM,) * 3))


def block(centre_mm: tuple[float, float, float], sides: int, value: int = 255) -> ProbabilityMap:
    """A cube of one probability, by its centre."""
    x, y, z = (round(mm / MM) - sides // 2 for mm in centre_mm)
    return ProbabilityMap(np.full((sides,) * 3, value, np.uint8), (x, y, z))


def body(z_mm: float = 250.0, sign: int = 1, mirror: bool = False) -> dict[str, ProbabilityMap]:
    """Organs in their usual order above and below the liver."""
    side = {"liver": 200.0, "spleen": 80.0}
    if mirror:
        side = {"liver": 80.0, "spleen": 200.0}
    places = {name: USUAL[name].z_mm or 0.0 for name in ("liver", "spleen", "kidney_right")}
    places |= {"stomach": -12.0, "duodenum": -75.0}
    return {
        name: block((side.get(name, 150.0), 100.0, z_mm + sign * z), 10 if name == "liver" else 6)
        for name, z in places.items()
    }


def test_a_structure_is_found_missing_or_outside_of_the_scan(frame: Frame) -> None:
    hu = np.full(frame.shape, 50, np.float32)
    names = [*body(), "pancreas", "urinary_bladder", "lung_right"]
    trusts, doubts = assess(body(z_mm=250), names, hu, frame, 0.5)
    assert trusts["liver"].state == "found" and trusts["pancreas"].state == "not found"
    assert trusts["urinary_bladder"].state == "outside", "290 mm below a liver at 250"
    assert trusts["lung_right"].state == "not found", "75 mm above it, of 445"
    assert doubts == []


def test_without_any_organ_nothing_is_said_to_be_outside(frame: Frame) -> None:
    hu = np.full(frame.shape, 50, np.float32)
    trusts, _ = assess({}, ["prostate"], hu, frame, 0.5)
    assert trusts["prostate"].state == "not found"


def test_size_counts_for_whole_organs_only(frame: Frame) -> None:
    hu = np.full(frame.shape, 50, np.float32)
    whole = block((150, 100, 200), 6)  # 27 ml
    cut = ProbabilityMap(whole.values, (0, 10, 10))
    trusts, _ = assess({"spleen": whole, "liver": cut}, ["spleen", "liver"], hu, frame, 0.5)
    assert trusts["spleen"].size == "small" and trusts["liver"].size is None
    assert trusts["spleen"].doubts == ("unusually small",)
    assert trusts["liver"].doubts == ()


def test_attenuation_is_held_against_the_tissue(frame: Frame) -> None:
    hu = np.full(frame.shape, 50, np.float32)
    maps = {"liver": block((200, 100, 200), 6), "lung_left": block((80, 100, 300), 6)}
    trusts, _ = assess(maps, list(maps), hu, frame, 0.5)
    assert trusts["liver"].attenuation == "usual" and trusts["liver"].mean_hu == 50
    assert trusts["lung_left"].attenuation == "high"
    assert "unusually high attenuation (50 HU)" in trusts["lung_left"].doubts


def test_a_mirrored_and_an_inverted_body_are_noticed(frame: Frame) -> None:
    hu = np.full(frame.shape, 50, np.float32)
    _, mirrored = assess(body(mirror=True), list(body()), hu, frame, 0.5)
    assert len(mirrored) == 1 and "left and right" in mirrored[0]
    _, inverted = assess(body(sign=-1), list(body()), hu, frame, 0.5)
    assert len(inverted) == 1 and "upside down" in inverted[0]


@pytest.mark.parametrize("value", [140, 255])
def test_what_is_uncertain_tells_nothing_about_the_body(frame: Frame, value: int) -> None:
    hu = np.full(frame.shape, 50, np.float32)
    maps = body(sign=-1)
    maps |= {
        name: replace(each, values=np.full_like(each.values, value)) for name, each in maps.items()
    }
    _, doubts = assess(maps, list(maps), hu, frame, 0.5)
    assert bool(doubts) == (value == 255), "a neck in which a network finds organs, not sure of any"
    maps["liver"] = block((200.0, 100.0, 250.0), 3)  # 3 ml
    assert assess(maps, list(maps), hu, frame, 0.5)[1] == []


def test_the_networks_own_estimate_is_the_dice_of_probabilities_that_are_right(
    frame: Frame,
) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (20, 20, 20)).astype(np.uint8)
    hu = np.full(frame.shape, 50, np.float32)
    trusts, _ = assess({"liver": ProbabilityMap(values, (20, 10, 20))}, ["liver"], hu, frame, 0.5)
    mask, p = values > 127.5, values / 255
    dice = []
    for _ in range(20):  # truths drawn by these probabilities
        truth = rng.random(values.shape) < p
        dice.append(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    assert trusts["liver"].own_dice == pytest.approx(np.mean(dice), abs=0.01)


def test_calibration_gives_the_dice_back_by_class_and_its_interval(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    names = ["liver", "pancreas"] * 200
    own = rng.uniform(0.6, 1.0, 400)
    level = np.array([0.0, -0.3] * 200)
    true = np.clip(0.8 * own + level + rng.normal(0, 0.03, 400), 0, 1)
    found = calibrate(names, own, true, weights_sha256="a" * 64, scans=200, source="drawn here")
    dice, low, high = found.expected("pancreas", 0.8) or (0.0, 0.0, 0.0)
    assert dice == pytest.approx(0.34, abs=0.02) and low < dice < high
    inside = [
        low <= t <= high
        for n, o, t in zip(names, own, true, strict=True)
        for _, low, high in filter(None, [found.expected(n, o)])
    ]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.02)
    assert found.expected("a new class", 0.8) is None
    found.write(tmp_path / "trust.json")
    assert Calibration.read(tmp_path / "trust.json") == found


def test_every_class_has_a_row_of_what_is_usual() -> None:
    assert list(USUAL) == list(NAMES)
    for name, usual in USUAL.items():
        for ends in (usual.volume_ml, usual.mean_hu):
            assert ends is None or ends[0] < ends[1], name
