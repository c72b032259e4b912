"""How a class is shown to people: its name and its colour.

A class is looked up by its exact name. An added class whose name means the same as a known one
("portal vein") is a class of its own, with a name and a colour of its own.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Iterable

from foundation.taxonomy import CLASSES

RGB = tuple[int, int, int]

_KNOWN = {each.name: each for each in CLASSES}
_STEP = 0.618034  # of the golden ratio: hues that are stepped by it stay far apart


def display_name(name: str) -> str:
    """Return what people call a class: "Left kidney", "Vertebra L1"."""
    if name in _KNOWN:
        return _KNOWN[name].display
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def colours(names: Iterable[str]) -> dict[str, RGB]:
    """Choose a colour for each class, all different.

    Args:
        names: All the classes of a model, or of a result. The 32 classes have their own colours;
            each other name has one that depends on it and on the names before it.

    Returns:
        Class name → red, green, blue, 0 to 255, in the order of `names`.
    """
    chosen: dict[str, RGB] = {}
    taken = {each.colour for each in CLASSES}
    for name in names:
        if name in _KNOWN:
            chosen[name] = _KNOWN[name].colour
            continue
        hue = zlib.crc32(name.encode()) % 360 / 360
        # There are some eight hundred of them; who has more classes has two alike.
        while (rgb := _rgb(hue)) in taken and len(taken) < 600:
            hue = (hue + _STEP) % 1
        taken.add(rgb)
        chosen[name] = rgb
    return chosen


def _rgb(hue: float) -> RGB:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.6, 0.9))
    return red, green, blue
