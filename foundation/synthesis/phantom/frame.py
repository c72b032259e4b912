"""The phantom's frame: body wall, spine, pelvis, diaphragm, lungs, heart and ribs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foundation.synthesis.phantom.body import FREE, SIDES, Array, Body, shifted
from foundation.synthesis.phantom.shapes import Floats, curve, rotation_deg

# Half axes of the torso's muscle and of its cavity, and the cavity's centre, by height (mm).
_HEIGHT = (-60, 0, 60, 110, 170, 240, 300, 400)
_MUSCLE_X = (150, 162, 160, 148, 138, 140, 148, 150)
_MUSCLE_Y = (100, 110, 105, 100, 98, 104, 110, 112)
_CAVITY_X = (25, 55, 82, 106, 124, 128, 134, 136)
_CAVITY_Y = (30, 58, 70, 78, 80, 86, 95, 98)
_CAVITY_CENTRE = (5, 0, 2, 6, 10, 8, 3, 0)
_BELLY = (0.0, 0.0, 0.3, 0.8, 1.0, 1.0, 0.5, 0.1)  # where visceral fat pushes the front out
_TOP_MM = 420
_WALL = (FREE, "muscle", "fat")


def half_axes_mm(fat_mm: float, belly_mm: float) -> tuple[float, float]:
    """Return how wide the body gets at most, from its axis.

    Args:
        fat_mm: Thickness of the fat under the skin.
        belly_mm: How far visceral fat pushes the front out.

    Returns:
        Millimetres across, and to the front.
    """
    return max(_MUSCLE_X) + fat_mm, max(_MUSCLE_Y) + 1.25 * fat_mm + belly_mm


def build(body: Body, fat_mm: float, belly_mm: float) -> None:
    """Paint everything that holds the organs, from the skin inwards.

    Args:
        body: An empty one.
        fat_mm: Thickness of the fat under the skin.
        belly_mm: How far visceral fat pushes the front out.
    """
    _torso(body, fat_mm, belly_mm)
    _spine(body)
    _pelvis(body)
    _chest(body)


def _superellipse(u: NDArray[np.floating], v: NDArray[np.floating]) -> Floats:
    """Below 1 inside; exponent 2.5 gives the torso's rounded-box section."""
    level = u * u * np.sqrt(np.abs(u)) + v * v * np.sqrt(np.abs(v))
    return np.asarray(level, np.float32)


def _torso(body: Body, fat_mm: float, belly_mm: float) -> None:
    """Skin, subcutaneous fat, the muscle wall and the free cavity."""
    c, height = body.canvas, body.canvas.axes[2]

    def by_height(values: Sequence[float]) -> Floats:
        return np.interp(height, _HEIGHT, values).astype(np.float32)[None, None, :]

    front = by_height(_BELLY) * np.float32(belly_mm / 2)
    muscle_x, muscle_y = by_height(_MUSCLE_X), by_height(_MUSCLE_Y) + front
    beneath = "air"
    for tissue, thickness in (("skin", fat_mm + 3), ("fat", fat_mm), ("muscle", 0.0)):
        layer = np.float32(thickness)
        shift = front + np.float32(0.25) * layer  # more fat at the belly than at the back
        level = _superellipse(c.x / (muscle_x + layer), (c.y - shift) / (muscle_y + layer))
        c.put(tissue, c.everywhere, level < 1, (beneath,))
        beneath = tissue
    across = c.x / by_height(_CAVITY_X)
    along = (c.y - by_height(_CAVITY_CENTRE) - front) / (by_height(_CAVITY_Y) + front)
    body.cavity = _superellipse(across, along)
    c.put(FREE, c.everywhere, body.cavity < 1, ("muscle",))


def _spine(body: Body) -> None:
    """Vertebrae with discs, canal and processes; the muscles along them."""
    c, rng = body.canvas, body.rng
    bow = rng.normal(6, 3)  # lumbar lordosis

    def centre(z: float) -> Array:
        return np.array([0.0, -44 + bow * np.sin((z - 60) / 180 * np.pi), z])

    heights = range(40, _TOP_MM + 1, 40)
    strand = [14, 18, 21, 22, 22, 21, 20, 19, 18, 17]
    psoas = [(28, -36, 248), (35, -36, 190), (48, -32, 135), (70, -8, 80), (90, 30, 20)]
    for side, sign in SIDES:
        back = [(sign * 27, float(centre(z)[1]) - 36, float(z)) for z in heights]
        body.pipe(f"autochthon_{side}", back, strand, _WALL)
        points = [(sign * x, y, z) for x, y, z in [*psoas, (105, 12, -55)]]
        body.pipe(f"iliopsoas_{side}", points, [8, 15, 20, 24, 19, 14], _WALL)
    width = float(body.about(21.0)[0])
    line = np.array([centre(z) for z in range(75, _TOP_MM + 1, 15)])
    solid = [name for name in c.names if name not in ("air", "skin", "spinal_cord")]
    c.tube("muscle", line, width - 2, solid)
    c.tube("vertebrae", line + np.array([0, -24, 0]), 14.0, solid)
    z, length = 97.0 + rng.normal(0, 4), 36.0
    while z < _TOP_MM:
        middle = centre(z)
        c.ellipsoid("vertebrae", middle, (width * 1.12, width * 0.85, length * 0.5), solid)
        for sign in (1, -1):
            root, tip = shifted(middle, sign * 12, -22, 0), shifted(middle, sign * 36, -30, 2)
            c.tube("vertebrae", [root, tip], (6.0, 4.0), solid)
        spine = [shifted(middle, 0, -32, 0), shifted(middle, 0, -50, -10)]
        c.tube("vertebrae", spine, (5.0, 4.0), solid)
        z, length = z + length, length * 0.965  # towards the head vertebrae get shorter
    c.tube("spinal_cord", line + np.array([0, -25, 0]), 8.5, solid)


def _pelvis(body: Body) -> None:
    """Sacrum, hip bones, femora and the gluteal muscles."""
    c = body.canvas
    soft = [n for n in c.names if n not in ("air", "skin", "vertebrae", "spinal_cord")]
    sacrum, radius = curve(
        [(0, -50, 78), (0, -70, 48), (0, -86, 15), (0, -74, -20)], [20, 22, 16, 6]
    )
    for strand in (-1, 0, 1):  # three strands side by side make it wide above, narrow below
        c.tube("sacrum", sacrum + strand * radius[:, None] * np.array([1.1, 0, 0]), radius, soft)
    c.tube("spinal_cord", sacrum[:6] + np.array([0, -8, 0]), 5.0, ("sacrum",))
    for side, sign in SIDES:
        buttock = rotation_deg(0, 0, sign * -28)
        c.ellipsoid(
            f"gluteus_{side}", (sign * 92, -66, 30), (58, 44, 85), ("muscle", "fat"), turn=buttock
        )
        wing = rotation_deg(0, sign * 12, sign * -38)
        c.ellipsoid(f"iliopsoas_{side}", (sign * 78, -8, 88), (22, 56, 50), _WALL, turn=wing)
        hip = f"hip_{side}"
        c.ellipsoid(hip, (sign * 88, -16, 82), (8.5, 66, 58), soft, turn=wing)  # ilium
        c.ellipsoid(hip, (sign * 80, 0, 6), (34, 36, 38), soft)  # around the socket
        c.tube(hip, [(sign * 78, -24, -8), (sign * 62, -44, -62)], (17.0, 13.0), soft)  # ischium
        c.tube(hip, [(sign * 70, 22, 2), (sign * 12, 48, -32)], (11.0, 10.0), soft)  # pubis
        head = body.near(sign * 89, 3, 0, sd_mm=2)
        size = float(body.about(23.0, sd=0.05)[0])
        c.tube("muscle", [head, shifted(head, sign * 30, -4, -12)], size + 3, (hip,))
        neck, shaft = shifted(head, sign * 36, -10, -18), shifted(head, sign * 42, -6, -80)
        c.tube(f"femur_{side}", [head, neck, shaft], (15.0, 17.0, 14.0), soft)
        c.ellipsoid(f"femur_head_{side}", head, [size] * 3, soft)


def _chest(body: Body) -> None:
    """The diaphragm's domes, lungs, heart and ribs."""
    c, rng = body.canvas, body.rng
    breath = rng.normal(0, 8)
    right, left = 352 + breath, 338 + breath + rng.normal(0, 6)
    depth = ((c.y - 10) / 95) ** 2
    dome = np.maximum(
        right - 80 * (((c.x - 65) / 85) ** 2 + depth),
        left - 80 * (((c.x + 72) / 85) ** 2 + depth),
    )
    dome = np.maximum(dome, 328 + breath - 20 * (c.x / 60) ** 2 - 60 * depth)  # below the heart
    body.below_dome = c.z < dome - 3
    c.put("muscle", c.everywhere, (c.z < dome + 1) & ~body.below_dome, (FREE,))
    middle = -6 + rng.normal(0, 3)
    for side, sign in SIDES:
        lung = (c.z > dome) & (body.cavity < 0.93) & (sign * (c.x - middle) > 22)
        c.put(f"lung_{side}", c.everywhere, lung, (FREE, "muscle"))
        body.solids[f"lung_{side}"] = (np.array([sign * 80, -20, 370.0]), np.array([32, 50, 28.0]))
    place, half = body.near(-22, 38, 388), body.about(64, 46, 48)
    within = ("lung_left", "lung_right", FREE)
    tilt = rotation_deg(0, 15, -25)
    body.solid("heart", place, half, within, turn=tilt, where=~body.below_dome)
    for level in range(8):
        reach = np.linspace(0.12, 0.86 if level > 1 else 0.5 + 0.1 * level, 14) * np.pi
        z = 268 + 27 * level - 35 * (1 - np.cos(reach))  # ribs fall towards the front
        for sign in (1, -1):
            line = np.column_stack([sign * 141 * np.sin(reach), 2 - 102 * np.cos(reach), z])
            c.tube("ribs", line, 5.5, _WALL)
    c.tube("ribs", [(0, 104, 335), (0, 106, 430)], (7.0, 10.0), _WALL)
