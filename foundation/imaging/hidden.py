"""Voxels that a label map shows as another class, in a small file beside it.

A label map has one class a voxel, and classes overlap: a tumour's voxels belong to its organ too.
What the map hides lies in a NumPy archive (.npz). For each class that is partly hidden, with V its
value in the label map, it has three arrays:

    V_start  int64 (3,)   first voxel of a box along the axes of the label map's file
    V_shape  int64 (3,)   its size in voxels
    V_bits   uint8 (x, y, ceil(z / 8))   the box, eight voxels a byte along the last axis, the first
                          voxel in the highest bit: `np.unpackbits(bits, axis=-1, count=z)`

The mask of the class is where the label map has V, and where the bits are 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundation.errors import VolumeError
from foundation.imaging import bits
from foundation.imaging.frame import Box, bounding_box

_KEYS = ("start", "shape", "bits")


@dataclass(frozen=True)
class HiddenVoxels:
    """The voxels of one class that a label map shows as another.

    Attributes:
        start: First voxel of the box around them.
        shape: Size of the box.
        bits: The box (X, Y, Z / 8, rounded up), packed by `foundation.imaging.bits`.
        count: How many voxels.
    """

    start: tuple[int, int, int]
    shape: tuple[int, int, int]
    bits: NDArray[np.uint8]
    count: int

    @classmethod
    def of(cls, mask: NDArray[np.bool_], start: tuple[int, int, int]) -> HiddenVoxels | None:
        """Crop and pack a mask (X, Y, Z) that begins at a voxel; None where it is empty."""
        box = bounding_box(mask)
        if box is None:
            return None
        part = mask[box]
        x, y, z = (first + near.start for first, near in zip(start, box, strict=True))
        return cls((x, y, z), part.shape, bits.pack(part), int(part.sum()))

    @property
    def box(self) -> Box:
        """The box, as slices of the label map."""
        x, y, z = (slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))
        return x, y, z

    def add_to(self, mask: NDArray[np.bool_]) -> None:
        """Set the voxels in a mask (X, Y, Z) on the label map's grid.

        Raises:
            VolumeError: The box does not lie within the mask.
        """
        if any(a + n > size for a, n, size in zip(self.start, self.shape, mask.shape, strict=True)):
            raise VolumeError(
                f"Hidden voxels lie outside of their label map: {self.shape} voxels from "
                f"{self.start} on in {mask.shape}. The files are not of one result."
            )
        mask[self.box] |= bits.unpack(self.bits, self.shape[2])


def write_hidden(path: Path, hidden: Mapping[int, HiddenVoxels]) -> None:
    """Write the hidden voxels of the classes of a label map.

    Args:
        path: The file, .npz.
        hidden: Value of the class in the label map → its hidden voxels.
    """
    arrays: dict[str, Any] = {}
    for value, found in hidden.items():
        arrays[f"{value}_start"] = np.array(found.start, np.int64)
        arrays[f"{value}_shape"] = np.array(found.shape, np.int64)
        arrays[f"{value}_bits"] = found.bits
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_hidden(path: Path) -> dict[int, HiddenVoxels]:
    """Read what `write_hidden` wrote.

    Raises:
        VolumeError: The file is missing, damaged, or is no such file.
    """
    found = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            values = dict.fromkeys(int(name.partition("_")[0]) for name in arrays.files)
            if set(arrays.files) != {f"{value}_{key}" for value in values for key in _KEYS}:
                raise ValueError(f"its arrays are {', '.join(arrays.files) or 'none'}")
            for value in values:
                start, shape, packed = (arrays[f"{value}_{key}"] for key in _KEYS)
                x, y, z = (int(size) for size in shape)
                expected = (x, y, -(-z // 8))
                if packed.dtype != np.uint8 or packed.shape != expected or start.min() < 0:
                    raise ValueError(f"the box of class {value} is wrong")
                i, j, k = (int(voxel) for voxel in start)
                count = int(bits.unpack(packed, z).sum())
                found[value] = HiddenVoxels((i, j, k), (x, y, z), packed, count)
    except Exception as error:  # of all kinds, for an archive that is damaged
        raise VolumeError(f"{path} holds no hidden voxels that can be read: {error}.") from error
    return found
