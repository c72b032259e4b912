"""One labelled scan of a dataset: where it lies, and what reading it gives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.files import nifti_stem

if TYPE_CHECKING:  # listing datasets imports no numpy
    import numpy as np
    from numpy.typing import NDArray


class DatasetWarning(UserWarning):
    """A part of a dataset is left out; the text says which and why."""


@dataclass(frozen=True)
class Structure:
    """A mask of one structure: a file, or the voxels of one value in a label map.

    Attributes:
        path: NIfTI file, or one of a folder of DICOM masks.
        name: What the structure is called.
        value: Of the label map; None where every voxel that is not 0 counts.
    """

    path: Path
    name: str
    value: int | None = None

    @property
    def label(self) -> str:
        """Its source label: with the value, so that a changed table is another dataset."""
        return self.name if self.value is None else f"{self.name} ({self.value})"


@dataclass(frozen=True)
class Case:
    """One scan of a dataset, found but not read.

    A layout finds its files; the dataset adds what its description has of them.

    Attributes:
        id: Unique in its dataset and safe as the name of a file.
        image: NIfTI file, or folder with one DICOM series; None for a label map without a scan.
        labels: The files that must be read for the labels.
        split: "train", "val" or "test", where the dataset's publisher gives it.
        names_file: One of `labels`: JSON with the source label name of each label value.
        named: The structures in `labels`, where they are not the names of files.
        dataset: Id of the dataset, e.g. "04".
        annotated: Classes that are labelled in this case; all others are unknown.
        unknown: Source labels whose voxels may be anything.
        weight: How often to draw it, relative to the dataset's other cases.
        licence: Of this case, where it differs from its dataset's.
    """

    id: str
    image: Path | None
    labels: tuple[Path, ...]
    split: str | None = None
    names_file: Path | None = None
    named: tuple[Structure, ...] = ()
    dataset: str = ""
    annotated: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    weight: float = 1.0
    licence: str | None = None

    @property
    def structures(self) -> tuple[Structure, ...]:
        """Its masks, where each structure is a file; names come from files or DICOM folders."""
        return self.named or tuple(
            Structure(path, nifti_stem(path) or path.parent.name) for path in self.labels
        )


@dataclass(frozen=True)
class Scan:
    """A case as read: everything on the grid of the image, in the order of its file.

    Attributes:
        ct: (X, Y, Z), float32 HU; None where there is none, and of labels that are read alone.
        affine: (4, 4), voxel index to millimetres, RAS+.
        labels: (X, Y, Z), uint8 or uint16.
        names: Label value → the source labels that such a voxel has; several where masks of
            structures overlap. `names[0]` is (). A source label that is no key of the dataset's
            label map has no class of its own.
    """

    ct: NDArray[np.float32] | None
    affine: NDArray[np.float64]
    labels: NDArray[Any]
    names: tuple[tuple[str, ...], ...]


def natural_key(text: str) -> list[tuple[int, int | str]]:
    """Return a sort key by which "volume-2" comes before "volume-10".

    Args:
        text: A name, such as a case's id.

    Returns:
        Its parts, numbers apart from the rest.
    """
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def safe_id(text: str) -> str:
    """Replace every character of `text` that some file system forbids by "_".

    Args:
        text: A name.

    Returns:
        A name for files and folders; never empty.
    """
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text).strip(".") or "_"
