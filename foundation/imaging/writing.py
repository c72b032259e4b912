"""Masks and label maps as NIfTI, on exactly the grid of the CT they belong to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from foundation.errors import VolumeError
from foundation.files import nifti_stem, replacing
from foundation.imaging.volumes import Volume


def write_mask(path: str | os.PathLike[str], mask: NDArray[Any], like: Volume) -> Path:
    """Write a mask as uint8 NIfTI, as `write_label_map` does.

    Args:
        path: A name that ends in .nii or .nii.gz.
        mask: The mask (X, Y, Z); nonzero is inside. One of bool is not copied.
        like: The CT whose grid it has.

    Returns:
        The path.
    """
    return write_label_map(path, np.asarray(mask, bool).view(np.uint8), like)


def write_label_map(path: str | os.PathLike[str], label_map: NDArray[Any], like: Volume) -> Path:
    """Write integer labels (X, Y, Z) as uint8 or uint16 NIfTI on exactly the grid of `like`.

    Shape, affine, sform and qform codes and units are those of the file `like` was read from. The
    file is written whole or not at all. Labels of the file's own type are not copied; with the
    first axis fastest (Fortran order), as in the file, they are written as they lie.

    Args:
        path: A name that ends in .nii or .nii.gz.
        label_map: The labels (X, Y, Z), 0 to 65535.
        like: The CT whose grid they have.

    Returns:
        The path.

    Raises:
        VolumeError: Another shape than `like`, not whole numbers, labels outside 0 … 65535, or a
            name that does not end in .nii or .nii.gz.
    """
    path = Path(path)
    if nifti_stem(path) is None:
        raise VolumeError(f"Cannot write {path}: name it .nii or .nii.gz.")
    label_map = np.asarray(label_map)
    if label_map.shape != like.shape:
        raise VolumeError(f"The label map has shape {label_map.shape}; the CT has {like.shape}.")
    if label_map.dtype.kind not in "biu":
        raise VolumeError(f"A label map holds whole numbers, not {label_map.dtype}.")
    low, high = int(label_map.min()), int(label_map.max())
    if low < 0 or high > 65535:
        raise VolumeError(f"Labels run from {low} to {high}; a file can hold 0 … 65535.")
    dtype = np.uint8 if high < 256 else np.uint16
    header = like.header.copy()
    header.set_data_dtype(dtype)
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0  # a CT's display window would hide every label
    header["descrip"] = b"labels by universal-ct"
    header.extensions.clear()
    kind: Any = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    frames = (np.newaxis,) * (len(like.file_shape) - 3)
    voxels = label_map.astype(dtype, copy=False)[(..., *frames)]
    image = kind(voxels, like.affine, header)
    with replacing(path) as temporary:
        nib.save(image, temporary)
    return path
