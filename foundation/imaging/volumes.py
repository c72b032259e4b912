"""CT volumes from NIfTI files, and masks back onto exactly the grid they came from."""

from __future__ import annotations

import gzip
import os
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage
from numpy.typing import ArrayLike, NDArray

from foundation.errors import VolumeError
from foundation.files import nifti_stem, replacing

SUPPORTED = (
    "Supported: NIfTI files (.nii, .nii.gz), a nibabel image, or a pair (array, affine) in HU. "
    "Convert DICOM with dcm2niix, other formats with SimpleITK or 3D Slicer."
)
HIGHEST_AIR_HU = -500.0  # anything above is tissue; a CT of a person shows air somewhere
SPACING_LIMITS_MM = (0.02, 50.0)
CLIPPED_SHARE = 0.005  # of the voxels at the very minimum and at the very maximum


class VolumeWarning(UserWarning):
    """The volume can be read, but may not be what the model was trained on; the text says why."""


@dataclass(frozen=True)
class Volume:
    """One CT in the order of its file.

    Attributes:
        array: (X, Y, Z), float32 HU, on the axes of the file, whatever their directions.
        affine: (4, 4), voxel index to millimetres, RAS+.
        header: Of the NIfTI it came from, whose codes and units masks inherit.
        file_shape: As stored; one frame more than `array` has axes where the file is 4-D.
        path: Of the file; None for an array or an image in memory.
        warnings: Doubts about the CT, in sentences, that `read_ct` warned of.
    """

    array: NDArray[np.float32]
    affine: NDArray[np.float64]
    header: Any
    file_shape: tuple[int, ...]
    path: Path | None = None
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along the three axes of the file."""
        x, y, z = self.array.shape
        return x, y, z

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along the three axes of the file."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel; by the determinant, so that sheared grids are right too."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


Source = str | os.PathLike[str] | SpatialImage | tuple[ArrayLike, ArrayLike] | Volume


def read_ct(source: Source) -> Volume:
    """Read a CT from a NIfTI path, a nibabel image or (array in HU, affine), and check it.

    Any orientation, spacing and number type; slope and intercept are applied; a 4-D file with one
    frame counts as 3-D.

    Args:
        source: Path, image, or pair. A `Volume` passes through unchanged.

    Returns:
        The CT, HU, on the axes of its file.

    Raises:
        VolumeError: No such file, not NIfTI, damaged or cut short, not one 3-D volume, no finite
            or no varying intensities, or a grid that has no spacing.

    Warns:
        VolumeWarning: Intensities look like MR or like an already windowed CT, or the file does
            not say which side is left. The text is also in `Volume.warnings`.
    """
    if isinstance(source, Volume):
        return source
    path: Path | None = None
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        image: Any = _open(path)
    elif isinstance(source, SpatialImage):
        image = source
    elif isinstance(source, Sequence) and len(source) == 2:
        image = _image_from_pair(*source)
    else:
        raise VolumeError(f"Cannot read a CT from {type(source).__name__}. {SUPPORTED}")
    label = str(path) if path else f"The given {type(source).__name__}"
    affine = _checked_affine(image.affine, label)
    _check_shape(image.shape, label)
    array = _load(image, label)
    doubts = _check_intensities(array, label)
    header = image.header if isinstance(image.header, nib.Nifti1Header) else None
    if header is None:
        header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine).header
        header.set_xyzt_units("mm")
    elif header["sform_code"] == 0 and header["qform_code"] == 0:
        doubts.append(
            f"{label} does not say how it lies in the body (sform and qform code 0): "
            "left and right may be swapped. Set the orientation in its header."
        )
    for doubt in doubts:
        warnings.warn(doubt, VolumeWarning, stacklevel=2)
    return Volume(array, affine, header.copy(), tuple(image.shape), path, tuple(doubts))


def write_mask(path: str | os.PathLike[str], mask: NDArray[Any], like: Volume) -> Path:
    """Write a mask as uint8 NIfTI, as `write_label_map` does.

    Args:
        path: A name that ends in .nii or .nii.gz.
        mask: The mask (X, Y, Z); nonzero is inside.
        like: The CT whose grid it has.

    Returns:
        The path.
    """
    return write_label_map(path, np.asarray(mask, bool).astype(np.uint8), like)


def write_label_map(path: str | os.PathLike[str], label_map: NDArray[Any], like: Volume) -> Path:
    """Write integer labels (X, Y, Z) as uint8 or uint16 NIfTI on exactly the grid of `like`.

    Shape, affine, sform and qform codes and units are those of the file `like` was read from. The
    file is written whole or not at all.

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
    image = kind(label_map.astype(dtype).reshape(like.file_shape), like.affine, header)
    with replacing(path) as temporary:
        nib.save(image, temporary)
    return path


def _open(path: Path) -> Any:
    """The image behind a path, with its header checked and its voxels still on disk."""
    if path.is_dir():
        raise VolumeError(f"{path} is a folder, not a file (a DICOM series?). {SUPPORTED}")
    if not path.is_file():
        raise VolumeError(f"{path} does not exist. Check the path.")
    if path.stat().st_size == 0:
        raise VolumeError(f"{path} is an empty file. Copy or download it again.")
    if nifti_stem(path) is None:
        raise VolumeError(f"{path} is not a NIfTI file. {SUPPORTED}")
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        image: Any = nib.load(path)
        kind = type(image.header)
        with opener(path, "rb") as stream:
            raw = kind(stream.read(kind.template_dtype.itemsize), check=False)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VolumeError(f"{path} is damaged or cut short: {error}. Copy it again.") from error
    except (ImageFileError, HeaderDataError, OSError, ValueError) as error:
        raise VolumeError(f"{path} is not a readable NIfTI file: {error}. {SUPPORTED}") from error
    # nibabel replaces a zero spacing by 1 mm without a word; with an sform it is not used at all.
    pixdim = np.asarray(raw["pixdim"][1:4], float)
    if image.header["sform_code"] == 0 and not (np.isfinite(pixdim) & (pixdim > 0)).all():
        raise VolumeError(
            f"{path} has spacing {pixdim.tolist()} mm; every spacing must be positive. "
            "Correct pixdim in its header, or convert it again from the original."
        )
    return image


def _image_from_pair(array: ArrayLike, affine: ArrayLike) -> Any:
    voxels, matrix = np.asarray(array), np.asarray(affine)
    if voxels.dtype.kind not in "biuf" or matrix.shape != (4, 4):
        raise VolumeError(
            f"Got an array of {voxels.dtype} with an affine of shape {matrix.shape}; give HU "
            "numbers (X, Y, Z) and a (4, 4) matrix from voxel index to millimetres, RAS+."
        )
    _checked_affine(matrix, "The given pair")  # before nibabel, which fails on a singular one
    if voxels.dtype.kind in "bf":
        voxels = voxels.astype(np.float32, copy=False)
    elif voxels.dtype.itemsize == 8:
        voxels = voxels.astype(np.int32)  # NIfTI readers disagree about 64-bit integers
    image: Any = nib.Nifti1Image(voxels, matrix.astype(float))
    image.header.set_xyzt_units("mm")
    return image


def _checked_affine(given: ArrayLike | None, label: str) -> NDArray[np.float64]:
    if given is None:
        raise VolumeError(f"{label} has no affine: where its voxels lie is unknown. {SUPPORTED}")
    affine = np.asarray(given, float)
    columns = affine[:3, :3]
    if not np.isfinite(affine).all():
        raise VolumeError(f"{label} has an affine that is not finite. Correct its header.")
    spacing = np.linalg.norm(columns, axis=0)
    low, high = SPACING_LIMITS_MM
    if spacing.min() < low or spacing.max() > high:
        raise VolumeError(
            f"{label} has spacing {np.round(spacing, 5).tolist()} mm; allowed is {low} to {high} "
            "mm. Correct its header (zero spacing, or metres or microns in place of millimetres?)."
        )
    if abs(np.linalg.det(columns / spacing)) < 1e-3:
        raise VolumeError(
            f"{label} has a singular affine: two of its axes point the same way. "
            "Correct its header, or convert it again from the original."
        )
    return affine


def _check_shape(shape: tuple[int, ...], label: str) -> None:
    if len(shape) < 3 or 0 in shape:
        what = "is empty" if 0 in shape else "is not a volume"
        raise VolumeError(f"{label} {what}: its shape is {shape}; give a 3-D CT.")
    if any(frames != 1 for frames in shape[3:]):
        raise VolumeError(
            f"{label} has shape {shape}: more than one frame. Give one 3-D volume, e.g. "
            "nibabel.load(path).slicer[..., 0]."
        )
    if min(shape[:3]) < 2:
        raise VolumeError(
            f"{label} has shape {shape}: a single slice is not a volume. Give the whole CT."
        )


def _load(image: Any, label: str) -> NDArray[np.float32]:
    dtype = image.get_data_dtype()
    if dtype.kind not in "biuf":
        raise VolumeError(
            f"{label} holds {dtype} (colour or complex); a CT has one number a voxel."
        )
    try:
        # float32 from the start: slope and intercept would else double the memory.
        array = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise VolumeError(
            f"{label} is damaged or cut short: {error}. Copy or download it again."
        ) from error
    return np.asarray(array.reshape(array.shape[:3]))


def _check_intensities(array: NDArray[np.float32], label: str) -> list[str]:
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise VolumeError(
            f"{label} holds NaN or infinite values. Replace them, e.g. with -1024 HU where nothing "
            "was measured."
        )
    if low == high:
        raise VolumeError(f"{label} is empty: every voxel is {low:g}. Give a CT in HU.")
    reason = _doubt(array, low, high)
    advice = "Masks may be empty or wrong. Give a CT in HU (air near -1000)."
    return [f"{label}: {reason} {advice}"] if reason else []


def _doubt(array: NDArray[np.float32], low: float, high: float) -> str:
    """Why these intensities may not be HU, or "" if they look like a CT."""
    if low <= HIGHEST_AIR_HU:
        return ""
    run = f"intensities run from {low:g} to {high:g}"
    if low >= 0 and high <= 1.001:
        return f"{run}: already windowed and scaled to [0, 1], not HU."
    if low >= 0 and high <= 255.001:
        return f"{run}: already windowed to 8 bits, not HU."
    clipped = min(np.mean(array == low), np.mean(array == high))
    if clipped >= CLIPPED_SHARE:
        return f"{run}, with many voxels at either end: already windowed, not full HU."
    if low >= 0:
        return f"{run}, never negative: an MR, or a CT stored without its intercept of -1024."
    return f"{run}, without any air: an MR, or a crop from inside the body."
