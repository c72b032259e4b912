"""The phantom's vessels, organs and lesions, in the order in which they claim the cavity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foundation.synthesis.phantom.body import FREE, SIDES, Array, Body, shifted
from foundation.synthesis.phantom.shapes import curve, rotation_deg


def fill(body: Body, female: bool) -> None:
    """Paint every organ: rigid and small ones first, the bowel into what is left.

    Args:
        body: One that `frame.build` has painted.
        female: Whether it has a uterus and no prostate.
    """
    _vessels(body)
    _retroperitoneum(body)
    _upper_abdomen(body)
    _pelvic_organs(body, female)
    _colon(body)
    _small_bowel(body)


def _vessels(body: Body) -> None:
    """Great vessels, iliac vessels, the celiac trunk and the portal vein."""
    c = body.canvas
    chest = (FREE, "lung_left", "lung_right", "muscle", "heart")
    aorta = [(-22, -26, 410), (-17, -20, 340), (-9, -11, 280), (-8, -8, 215), (-4, -8, 145)]
    body.pipe("aorta", aorta, [12.5, 12, 11.5, 10.5, 9.5], chest, sd_mm=1.5)
    cava = [(20, 2, 400), (22, -2, 350), (24, -10, 300), (19, -10, 220), (15, -10, 128)]
    body.pipe("inferior_vena_cava", cava, [14, 14, 13, 12, 11], chest, sd_mm=1.5)
    for side, sign in SIDES:
        flank = (FREE, "muscle", f"iliopsoas_{side}")
        down = [(28, -8, 112), (55, -6, 78), (78, 44, 22), (86, 52, -50)]
        artery = [(-4.0, -8.0, 142.0), *((sign * x, y, z) for x, y, z in down)]
        vein = [(12.0, -12.0, 126.0), *((sign * (x - 6), y - 10, z) for x, y, z in down)]
        body.pipe(f"iliac_artery_{side}", artery, [7, 6.5, 6, 5.5, 5], flank, sd_mm=2)
        body.pipe(f"iliac_vena_{side}", vein, [8, 8, 7.5, 7, 6.5], flank, sd_mm=2)
    root = body.near(-8, 0, 262, sd_mm=2)
    c.tube("celiac_trunk", [root, shifted(root, 0, 20, 3)], 4.5, (FREE,))
    for tip in ((22, 20, 7), (-24, 15, 9)):  # towards the liver and the spleen
        c.tube("celiac_trunk", [shifted(root, 0, 19, 3), shifted(root, *tip)], 3.5, (FREE,))
    splenic = [(-82, -20, 266), (-45, -2, 248), (-10, 10, 236), (16, 8, 222)]
    portal = [(26, 12, 240), (40, 14, 268)]
    radii = [4.5, 5, 5, 7, 7.5, 7]
    body.pipe("portal_vein_and_splenic_vein", [*splenic, *portal], radii, sd_mm=2)


def _retroperitoneum(body: Body) -> None:
    """Adrenals, pancreas, duodenum, and kidneys with their fatty sinus; one may be missing."""
    c, rng = body.canvas, body.rng
    for side, sign in SIDES:
        apex = body.near(sign * 36, -28, 286, sd_mm=3)
        medial, lateral = shifted(apex, 0, -6, -26), shifted(apex, sign * 12, -12, -20)
        limbs = [medial, shifted(apex, sign * -6, 4, -4), lateral]
        c.tube(f"adrenal_gland_{side}", limbs, 5.0, (FREE,))
    rise = rng.normal(0, 8)
    head, neck = [(36, 6, 190), (38, 12, 212)], (14, 18, 226)
    tail = [(-22, 18, 238 + rise), (-72, -12, 258 + rise)]
    body.pipe("pancreas", [*head, neck, *tail], [13, 17, 10.5, 11.5, 10])
    loop = [(32, 34, 230), (56, 18, 228), (64, 2, 200), (52, -4, 168), (16, 8, 158), (-20, 8, 172)]
    body.pipe("duodenum", loop, [12, 13, 13, 12.5, 12, 12])
    missing = rng.choice(("none", "left", "right"), p=(0.9, 0.05, 0.05))
    for (side, sign), height in zip(SIDES, (212, 226), strict=True):
        turn = rotation_deg(-12, sign * -10, sign * -25)
        centre = body.near(sign * 70, -40, height, sd_mm=5)
        half = body.about(28, 25, 55, sd=0.12)
        if side == missing:
            continue
        where = body.below_dome & (body.cavity < 0.98)
        body.solid(f"kidney_{side}", centre, half, turn=turn, where=where)
        sinus = centre + turn @ np.array([sign * -20.0, 4.0, 0.0])
        c.ellipsoid(FREE, sinus, (15, 8, 20), (f"kidney_{side}",), turn=turn)


def _upper_abdomen(body: Body) -> None:
    """Gallbladder, liver with its vessels, spleen, gullet and stomach."""
    c, rng = body.canvas, body.rng
    if rng.random() > 0.15:
        fundus = body.near(52, 58, 205, sd_mm=5)
        pear = [fundus, shifted(fundus, -5, -20, 18), shifted(fundus, -11, -38, 40)]
        line, radius = curve(pear, [15, 12, 5])
        c.tube("gallbladder", line, radius * body.about(1.0, sd=0.2), (FREE,))
    limit = body.below_dome & (body.cavity < 0.95)
    lobe, half = body.near(78, 4, 282), body.about(66, 84, 84)
    body.solid("liver", lobe, half, turn=rotation_deg(0, -12, 0), rough=0.08, where=limit)
    lobe, half = body.near(0, 46, 302), body.about(82, 36, 36)
    c.ellipsoid(
        "liver", lobe, half, (FREE,), turn=rotation_deg(0, -14, 12), rough=0.08, where=limit
    )
    _liver_vessels(body)
    if rng.random() > 0.05:
        place, half = body.near(-104, -32, 270), body.about(31, 46, 56, sd=0.18)
        body.solid("spleen", place, half, turn=rotation_deg(18, -8, -28), where=limit)
    gullet = [(-4, -14, 410), (-8, -2, 355), (-20, 6, 328), (-36, 8, 312)]
    around = (FREE, "muscle", "lung_left", "heart")
    body.pipe("esophagus", gullet, [9, 9, 9, 10], around, sd_mm=2)
    size = float(np.exp(rng.normal(0, 0.2)))
    upper = [(-55, -6, 322), (-66, 8, 292), (-64, 34, 258)]
    lower = [(-34, 54, 234), (4, 48, 228), (30, 36, 230)]
    body.pipe("stomach", [*upper, *lower], np.array([30, 36, 31, 24, 19, 12]) * size)


def _liver_vessels(body: Body) -> None:
    """Portal branches from the hilum and hepatic veins to the cava, inside the liver."""
    centre, half = body.solids["liver"]
    hilum, cava = np.array([40.0, 14, 268]), np.array([24.0, -8, 322])
    bends = []
    for index in range(9):
        root = hilum if index % 3 else cava
        aim = body.rng.normal(0, 1, 3)
        tip = centre + 0.72 * half * aim / np.linalg.norm(aim)
        middle = (tip + root) / 2 + body.rng.normal(0, 8, 3)
        line, radius = curve([root, middle, tip], [5.5, 4.5, 2.5])
        body.canvas.tube("hepatic_vessel", line, radius, ("liver",))
        bends.append(middle)
    body.lines["hepatic_vessel"] = (np.array(bends), np.full(len(bends), 4.0))


def _pelvic_organs(body: Body, female: bool) -> None:
    """Rectum, bladder, and prostate or uterus."""
    rng = body.rng
    wall = (FREE, "muscle")
    rectum = [(4, -46, 72), (2, -56, 50), (0, -58, 20), (0, -50, -10), (0, -34, -55)]
    body.pipe("rectum", rectum, [15, 18, 20, 18, 12], wall)
    filling = float(np.exp(rng.normal(0, 0.3)))
    if female:
        place, half = body.near(0, -4, 44), body.about(28, 22, 36, sd=0.2)
        if rng.random() > 0.2:
            body.solid("uterus", place, half, turn=rotation_deg(-50))
    elif rng.random() > 0.05:
        body.solid("prostate", body.near(0, 2, -26, sd_mm=2), body.about(24, 18, 19, sd=0.2), wall)
    bladder = body.near(0, 24, 8 + 14 * (filling - 1), sd_mm=3)
    body.solid("urinary_bladder", bladder, np.array([38, 30, 28]) * filling, wall)


def _colon(body: Body) -> None:
    """The colon's frame with haustra, from the caecum to the rectum."""
    rng = body.rng
    ascending = [(82, 16, 88), (94, 8, 120), (100, 2, 165), (92, 16, 205)]
    sag = min(110.0, rng.exponential(30.0))  # in some people it hangs down into the pelvis
    transverse = [(66, 52, 200 - sag / 4), (22, 70, 180 - sag)]
    transverse += [(-24, 70, 182 - sag), (-66, 52, 214 - sag / 4)]
    descending = [(-98, 4, 252), (-108, -14, 215), (-106, -12, 160), (-96, 4, 118)]
    sigmoid = [(-66, 20, 92), (-34, 26, 78), (2, 12, 96), (16, -22, 92), (4, -46, 72)]
    frame = np.array([*ascending, *transverse, *descending, *sigmoid], float)
    knots = frame + rng.normal(0, 5, frame.shape)
    wide = np.interp(np.arange(len(frame)), (0, 2, 7, 11, 16), (29, 26, 22, 17, 15))
    line, radius = curve(knots, wide * body.about(1.0, sd=0.15)[0])
    travelled = np.cumsum(np.linalg.norm(np.diff(line, axis=0, prepend=line[:1]), axis=1))
    haustra = np.abs(np.sin(travelled * np.pi / rng.uniform(26, 38)))
    radius = radius * (0.88 + 0.18 * haustra)
    body.canvas.tube("colon", line, radius, (FREE,))
    body.lines["colon"] = (line[:-8], radius[:-8])


def _small_bowel(body: Body) -> None:
    """Loops to and fro across the middle, in layers, in what is left of the cavity."""
    rng = body.rng
    loops: list[tuple[float, float, float]] = []
    for row, z in enumerate(np.arange(57, 200, 25.0)):
        for column, y in enumerate((-2.0, 27.0, 56.0)):
            xs = (-70.0, -35.0, 0.0, 35.0, 70.0)
            loops += [(x, y, float(z)) for x in (xs if (row + column) % 2 else xs[::-1])]
    knots = np.array(loops) + rng.normal(0, 7, (len(loops), 3))
    line, radius = curve(knots, rng.uniform(9, 14.5, len(loops)))
    body.canvas.tube("small_bowel", line, radius, (FREE,))


def grow_lesions(body: Body) -> None:
    """Paint each kind of lesion with some probability, inside or at the surface of its organ.

    Args:
        body: One with organs. Each kind of lesion is drawn by chance.
    """
    rng = body.rng
    kidneys = [name for name in ("kidney_right", "kidney_left") if name in body.solids]
    cystic, ill = (kidneys[int(rng.integers(len(kidneys)))] for _ in range(2))
    _in_solid(body, "kidney_cyst", cystic, 0.4, (8, 26), 0.85, (cystic, FREE))
    _in_solid(body, "kidney_tumor", ill, 0.4, (10, 34), 0.85, (ill, FREE))
    for _ in range(3):
        _in_solid(body, "liver_tumor", "liver", 0.25, (8, 36), 0.7, ("liver", "hepatic_vessel"))
    lung = str(rng.choice(("lung_left", "lung_right")))
    _in_solid(body, "lung_tumor", lung, 0.4, (8, 24), 0.9, (lung,))
    vessels = ("liver", "hepatic_vessel")
    _on_line(body, "hepatic_vessel_tumor", "hepatic_vessel", (10, 26), vessels)
    _on_line(body, "pancreas_tumor", "pancreas", (9, 22), ("pancreas", FREE))
    _on_line(body, "colon_tumor", "colon", (14, 26), ("colon", FREE))


def _in_solid(
    body: Body,
    name: str,
    organ: str,
    chance: float,
    size_mm: tuple[float, float],
    depth: float,
    over: Sequence[str],
) -> None:
    """Perhaps paint a lesion at up to `depth` of an organ's half axes from its centre."""
    centre, half = body.solids[organ]
    aim = body.rng.normal(0, 1, 3)
    place = centre + half * aim / np.linalg.norm(aim) * depth * body.rng.random() ** (1 / 3)
    _paint_lesion(body, name, place, chance, size_mm, over)


def _on_line(
    body: Body, name: str, organ: str, size_mm: tuple[float, float], over: Sequence[str]
) -> None:
    """Perhaps paint a lesion somewhere along an organ's centre line."""
    line, radius = body.lines[organ]
    at = int(body.rng.integers(1, len(line) - 1))
    place = line[at] + body.rng.normal(0, 0.3, 3) * radius[at]
    _paint_lesion(body, name, place, 0.35, size_mm, over)


def _paint_lesion(
    body: Body,
    name: str,
    place: Array,
    chance: float,
    size_mm: tuple[float, float],
    over: Sequence[str],
) -> None:
    radii = body.rng.uniform(*size_mm) * body.rng.uniform(0.75, 1.2, 3)
    if body.rng.random() < chance:
        body.canvas.ellipsoid(name, place, radii, over, rough=0.15)
