"""How a class is shown to people: its name and its colour."""

from __future__ import annotations

import colorsys
import zlib

from foundation import taxonomy
from foundation.errors import UsageError


def display_name(name: str) -> str:
    """What people call a class: from the taxonomy, or the name itself for a class of your own."""
    known = _known(name)
    words = name.replace("_", " ")
    return known.display if known else words[:1].upper() + words[1:]  # "Vertebra L1"


def colour(name: str) -> tuple[int, int, int]:
    """RGB colour of a class: from the taxonomy; a name of your own always gets the same one."""
    known = _known(name)
    if known:
        return known.colour
    hue = zlib.crc32(name.encode()) % 360 / 360
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.6, 0.9))
    return red, green, blue


def _known(name: str) -> taxonomy.AnatomicalClass | None:
    try:
        return taxonomy.by_name(name)
    except UsageError:
        return None
