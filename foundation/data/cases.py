"""One labelled scan of a dataset: where it lies, and what reading it gives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class DatasetWarning(UserWarning):
    """A part of a dataset is left out; the text says which and why."""


@dataclass(frozen=True)
class Case:
    """One scan of a dataset, found but not read.

    dataset: its id, e.g. "04", or the name of a dataset of the user's own.
    id: unique in its dataset and safe as the name of a file.
    image: NIfTI file, or folder with one DICOM series; None for a label map without a scan.
    labels: the files that must be read for the labels.
    annotated: classes that are labelled in this case; all others are unknown.
    weight: how often to draw it, relative to the dataset's other cases.
    unknown: source labels whose voxels may be anything.
    names_file: one of `labels`: JSON with the source label name of each label value.
    licence: of this case, where it differs from its dataset's.
    split: "train", "val" or "test", where the dataset's publisher says so.
    """

    dataset: str
    id: str
    image: Path | None
    labels: tuple[Path, ...]
    annotated: tuple[str, ...]
    weight: float = 1.0
    unknown: tuple[str, ...] = ()
    names_file: Path | None = None
    licence: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Scan:
    """A case as read: everything on the grid of the image, in the order of its file.

    ct (X, Y, Z): float32 HU; None for a label map without a scan.
    affine (4, 4): voxel index to millimetres, RAS+.
    labels (X, Y, Z): uint8 or uint16.
    names: label value → the source labels that such a voxel has; several where masks of structures
        overlap. `names[0]` is (). A source label that is no key of the dataset's label map has no
        class of its own.
    """

    ct: NDArray[np.float32] | None
    affine: NDArray[np.float64]
    labels: NDArray[Any]
    names: tuple[tuple[str, ...], ...]


def natural_key(text: str) -> list[tuple[int, int | str]]:
    """Sort key by which "volume-2" comes before "volume-10"."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def safe_id(text: str) -> str:
    """`text` with every character that some file system forbids replaced by "_"."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text).strip(".") or "_"
