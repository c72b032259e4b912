"""CT volumes from files, images and arrays: checked, in the order and the numbers of the file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage
from numpy.typing import ArrayLike, NDArray

from foundation.errors import VolumeError
from foundation.imaging.geometry import check_shape, checked_affine, header_doubts
from foundation.imaging.intensities import doubt_about, sample_of
from foundation.imaging.nifti import SUPPORTED, Scaled, StoredVoxels, open_nifti, scaled


class VolumeWarning(UserWarning):
    """The volume can be read, but may not be what the model was trained on; the text says why."""


@dataclass(frozen=True)
class Volume:
    """One CT in the order of its file, with the numbers of its file.

    The numbers stay as they are stored, most often as int16, and become HU where they are needed:
    a plane at a time, so that no second copy of the whole CT lies in memory.

    Attributes:
        stored: (X, Y, Z), the stored numbers, on the axes of the file, whatever their directions.
        affine: (4, 4), voxel index to millimetres, RAS+.
        header: Of the NIfTI it came from, whose codes and units masks inherit.
        file_shape: As stored; one frame more than `stored` has axes where the file is 4-D.
        path: Of the file; None for an array or an image in memory.
        warnings: Doubts about the CT, in sentences, that `read_ct` warned of.
        slope: HU are stored numbers × slope + intercept.
        intercept: See `slope`.
    """

    stored: NDArray[Any]
    affine: NDArray[np.float64]
    header: Any
    file_shape: tuple[int, ...]
    path: Path | None = None
    warnings: tuple[str, ...] = ()
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def array(self) -> NDArray[np.float32]:
        """HU (X, Y, Z) as float32, computed anew at each access; see `hu` for a part."""
        if self.stored.dtype == np.float32 and (self.slope, self.intercept) == (1, 0):
            return self.stored
        whole = np.empty_like(self.stored, np.float32)
        along = int(np.argmax(np.abs(self.stored.strides)))
        planes = zip(np.moveaxis(whole, along, 0), np.moveaxis(self.stored, along, 0), strict=True)
        for plane, numbers in planes:
            plane[:] = self.scaled(numbers)
        return whole

    def hu(self, part: tuple[slice | int, ...]) -> NDArray[np.float32]:
        """Return HU of a part of the volume.

        Args:
            part: What would index (X, Y, Z).

        Returns:
            float32, of the part's shape.
        """
        return self.scaled(self.stored[part])

    def scaled(self, numbers: NDArray[Any]) -> NDArray[np.float32]:
        """Turn stored numbers into HU.

        Args:
            numbers: Any part of `stored`, turned in whatever way.

        Returns:
            float32 HU of the same shape.
        """
        return scaled(numbers, self.slope, self.intercept)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along the three axes of the file."""
        x, y, z = self.stored.shape
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
    frame counts as 3-D. A file is read to its end, so that a checksum that it has is compared.

    Args:
        source: Path, image, or pair, whose array is not copied. A `Volume` passes through
            unchanged.

    Returns:
        The CT on the axes of its file.

    Raises:
        VolumeError: No such file, not NIfTI, damaged or cut short, more than memory holds, not one
            3-D volume, values that are not finite or do not vary, or a grid that has no spacing.

    Warns:
        VolumeWarning: Intensities do not look like HU of a person; the header does not say which
            side is left, or tells of two grids; the file holds more than its header says. The text
            is also in `Volume.warnings`.
    """
    if isinstance(source, Volume):
        return source
    given = _given(source)
    affine = checked_affine(given.affine, given.label)
    check_shape(given.shape, given.label)
    if given.dtype.kind not in "biuf":
        raise VolumeError(
            f"{given.label} holds {given.dtype} (colour or complex); a CT has one number a voxel."
        )
    header, doubts = given.header, []
    if isinstance(header, nib.Nifti1Header):
        doubts += header_doubts(header, given.pixdim_mm, given.shape, given.label)
    else:
        header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine).header
        header.set_xyzt_units("mm")
    numbers, more = given.read()
    first_frame = (slice(None),) * 3 + (0,) * (len(given.shape) - 3)
    volume = Volume(
        stored=numbers.stored[first_frame],
        affine=affine,
        header=header.copy(),
        file_shape=given.shape,
        path=given.path,
        slope=numbers.slope,
        intercept=numbers.intercept,
    )
    doubts += more + _intensity_doubts(volume, given.label)
    for doubt in doubts:
        warnings.warn(doubt, VolumeWarning, stacklevel=2)
    return replace(volume, warnings=tuple(doubts))


@dataclass(frozen=True)
class _Given:
    """A source before its voxels are read."""

    label: str
    header: Any
    affine: ArrayLike | None
    pixdim_mm: ArrayLike
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], tuple[Scaled, list[str]]]
    path: Path | None = None


def _given(source: Any) -> _Given:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        file = open_nifti(path)
        voxels = file.voxels
        return _Given(
            str(path), file.header, file.affine, file.pixdim_mm,
            voxels.shape, voxels.dtype, voxels.read, path,
        )  # fmt: skip
    image = _image_of(source)
    label = f"The given {type(source).__name__}"
    on_disk = StoredVoxels.of_image(image)
    pixdim = image.header["pixdim"][1:4] if isinstance(image.header, nib.Nifti1Header) else ()
    return _Given(
        label, image.header, image.affine, pixdim, tuple(image.shape), image.get_data_dtype(),
        on_disk.read if on_disk else lambda: (_in_memory(image, label), []),
    )  # fmt: skip


def _image_of(source: Any) -> Any:
    if isinstance(source, SpatialImage):
        return source
    if isinstance(source, Sequence) and len(source) == 2:
        return _image_from_pair(*source)
    raise VolumeError(f"Cannot read a CT from {type(source).__name__}. {SUPPORTED}")


def _image_from_pair(array: ArrayLike, affine: ArrayLike) -> Any:
    voxels, matrix = np.asarray(array), np.asarray(affine)
    if voxels.dtype.kind not in "biuf" or matrix.shape != (4, 4):
        raise VolumeError(
            f"Got an array of {voxels.dtype} with an affine of shape {matrix.shape}; give HU "
            "numbers (X, Y, Z) and a (4, 4) matrix from voxel index to millimetres, RAS+."
        )
    checked_affine(matrix, "The given pair")  # before nibabel, which fails on a singular one
    if voxels.dtype.kind in "bf":
        voxels = voxels.astype(np.float32, copy=False)
    elif voxels.dtype.itemsize == 8:
        voxels = voxels.astype(np.int32)  # NIfTI readers disagree about 64-bit integers
    image: Any = nib.Nifti1Image(voxels, matrix.astype(float))
    image.header.set_xyzt_units("mm")
    return image


def _in_memory(image: Any, label: str) -> Scaled:
    """The voxels of an image whose file, if it has any, is none that is read here."""
    try:
        if nib.is_proxy(image.dataobj):
            return Scaled(image.get_fdata(dtype=np.float32, caching="unchanged"))
        array = np.asarray(image.dataobj)
    except (EOFError, OSError, ValueError) as error:
        raise VolumeError(
            f"{label} is damaged or cut short: {error}. Copy or download it again."
        ) from error
    wide = array.dtype.kind in "bf" or array.dtype.itemsize > 4
    return Scaled(array.astype(np.float32, copy=False) if wide else array)


def _intensity_doubts(volume: Volume, label: str) -> list[str]:
    stored = volume.stored
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        ends = volume.scaled(np.array([stored.min(), stored.max()]))
    low, high = float(ends.min()), float(ends.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise VolumeError(_not_finite(volume, label))
    if low == high:
        raise VolumeError(f"{label} is empty: every voxel is {low:g}. Give a CT in HU.")
    reason = doubt_about(sample_of(volume, low, high))
    if not reason:
        return []
    scaling = ""
    if (volume.slope, volume.intercept) not in ((1, 0), (1, -1024)):
        scaling = f" Its header has slope {volume.slope:g} and intercept {volume.intercept:g}."
    advice = "Masks may be empty or wrong. Give a CT in HU (air near -1000)."
    return [f"{label}: {reason}{scaling} {advice}"]


def _not_finite(volume: Volume, label: str) -> str:
    """How many voxels have no finite value, and where the first lies."""
    count, first = 0, None
    for z in range(volume.shape[2]):
        with np.errstate(over="ignore"):
            broken = np.argwhere(~np.isfinite(volume.hu((slice(None), slice(None), z))))
        count += len(broken)
        if first is None and len(broken):
            first = (int(broken[0][0]), int(broken[0][1]), z)
    return (
        f"{label} holds NaN or infinite values: {count:,} of {np.prod(volume.shape):,} voxels, "
        f"the first at {first} (counted from 0). Replace them, e.g. with -1024 HU where nothing "
        "was measured."
    )
