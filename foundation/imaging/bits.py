"""Masks with eight voxels a byte: every class of a scan fits in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Pack a mask (X, Y, Z) along its last axis: (X, Y, Z / 8, rounded up)."""
    return np.packbits(mask, axis=-1)


def unpack(bits: NDArray[np.uint8], size: int) -> NDArray[np.bool_]:
    """Return the mask (X, Y, `size`), or a part of it, that `pack` packed."""
    return np.unpackbits(bits, axis=-1, count=size).view(bool)  # each byte is 0 or 1
