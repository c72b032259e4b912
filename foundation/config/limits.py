"""Bounds of what a configuration may say, and the checks that several of its parts share.

A configuration may come from anybody. What no network needs is refused before it costs memory or
time: a window of a billion voxels, an overlap at which a CT takes years.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from foundation.errors import WeightsError

SPACING_LIMITS_MM = (0.1, 50.0)
MOST_PATCH = 4096  # voxels along an axis; a window is never larger than the CT
MOST_OVERLAP = 0.9  # a voxel is then computed a thousand times
MOST_HU = 1e6
MOST_CHANNELS = 64
MOST_CLASSES = 10_000
MOST_BRANCHES = 256
MOST_WIDTH = 8192  # of any whole number among a backbone's options, and of a branch
MOST_OPTIONS = 1000  # values in a backbone's options; DiNTS' paths are 120
MOST_DIVISOR = 1024
MOST_TEXT_DIM = 65_536
MOST_RANK = 4096
MOST_ALPHA = 1e6
MOST_NAME = 200  # signs


def are_numbers(values: Any, count: int, kind: type = float) -> bool:
    """Tell whether these are so many finite numbers; with `int`, whole ones."""
    allowed = (int,) if kind is int else (int, float)
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(
            isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)
            for value in values
        )
    )


def doubled(names: Sequence[str]) -> list[str]:
    """Return the names that stand there more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def parsed(text: str, source: str) -> Any:
    """Parse JSON.

    Args:
        text: To parse.
        source: Its path, for errors.

    Raises:
        WeightsError: It is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of too many digits or brackets, too
        raise WeightsError(f"{source} is not valid JSON: {error}.") from error
