"""NIfTI files: the header as it is stored, and the voxels as they are stored, to the last byte.

The voxels are read here and not by nibabel, which stops at the last voxel: the checksum that every
.nii.gz ends with is then never compared, and a damaged file gives other voxels without a word.
"""

from __future__ import annotations

import gzip
import logging
import os
import stat
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from foundation.errors import VolumeError
from foundation.files import nifti_stem
from foundation.imaging.memory import require_memory

SUPPORTED = (
    "Supported: NIfTI files (.nii, .nii.gz), a nibabel image, or a pair (array, affine) in HU. "
    "Convert DICOM with dcm2niix, other formats with SimpleITK or 3D Slicer."
)
_KINDS = (nib.Nifti1Header, nib.Nifti2Header)
_LONGEST_HEADER = 544
_EXACT = 1 << 23  # float32 holds whole numbers of twice that
_BLOCK = 1 << 22  # bytes read at a time
_WORKING_BYTES = 2  # a voxel, of the label map that follows
_MOST_DEFLATED = 1040  # deflate makes at most 1032 bytes of one
_MOST_BEYOND = 1 << 30  # bytes after the voxels that are read on for the checksum
_DAMAGED = (EOFError, OSError, ValueError, zlib.error)

# nibabel tells of each thing that it mends on standard error; what matters is checked here.
_SILENT = logging.Logger("foundation.nifti", level=logging.CRITICAL + 1)


@dataclass(frozen=True)
class Scaled:
    """Numbers as they are stored, and how they become values: number × slope + intercept.

    Attributes:
        stored: The numbers.
        slope: See above.
        intercept: See above.
    """

    stored: NDArray[Any]
    slope: float = 1.0
    intercept: float = 0.0


@dataclass(frozen=True)
class StoredVoxels:
    """Where in a file the voxels lie, and how they are stored.

    Attributes:
        path: Of the file.
        shape: Of the array.
        dtype: Of each number, byte order included.
        offset: Of the first byte in the file, uncompressed.
        slope: A value is number × slope + intercept.
        intercept: See above.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float = 1.0
    intercept: float = 0.0

    @classmethod
    def of_image(cls, image: Any) -> StoredVoxels | None:
        """Find the voxels of a nibabel image that has not read them yet.

        Args:
            image: Any image of nibabel.

        Returns:
            Where they lie; None where they are in memory, or in no NIfTI file on disk.
        """
        proxy = image.dataobj
        if type(proxy) is not ArrayProxy or not isinstance(proxy.file_like, str | os.PathLike):
            return None
        path = Path(proxy.file_like)
        if not isinstance(image, nib.Nifti1Image) or nifti_stem(path) is None:
            return None
        dtype = np.dtype(proxy.dtype)
        return cls(path, proxy.shape, dtype, int(proxy.offset), proxy.slope, proxy.inter)

    def read(self) -> tuple[Scaled, list[str]]:
        """Read the voxels, and the file to its end, which checks a checksum that it may have.

        Numbers of more than four bytes are scaled and kept as float32.

        Returns:
            The numbers in the machine's byte order, first axis fastest, as in the file; and doubts
            about the file, in sentences.

        Raises:
            VolumeError: The file is damaged, shorter than its header says, or larger than memory.
        """
        _check_regular(self.path)
        _check_size(self.path, self.offset, self.shape, self.dtype.itemsize)
        wide = self.dtype.itemsize > 4
        kept = np.dtype(np.float32) if wide else self.dtype.newbyteorder("=")
        sizes = "×".join(map(str, self.shape))
        require_memory(
            prod(self.shape) * (kept.itemsize + _WORKING_BYTES), f"{self.path} ({sizes} voxels)"
        )
        try:
            with _opened(self.path) as stream:
                _skip(stream, self.offset)
                flat = np.empty(prod(self.shape), kept)
                self._fill(flat, stream, wide)
                beyond = _beyond(stream)
        except MemoryError as error:
            raise VolumeError(f"{self.path} ({sizes} voxels) does not fit in memory.") from error
        except _DAMAGED as error:
            raise _damaged(self.path, error) from error
        doubts = [_too_long(self.path, self.shape, self.dtype, beyond)] if beyond else []
        slope, intercept = (1.0, 0.0) if wide else (self.slope, self.intercept)
        return Scaled(flat.reshape(self.shape, order="F"), slope, intercept), doubts

    def _fill(self, flat: NDArray[Any], stream: BinaryIO, wide: bool) -> None:
        if not wide:
            _read_into(stream, flat)
            if not self.dtype.isnative:
                flat.byteswap(inplace=True)
            return
        size = _BLOCK // self.dtype.itemsize
        for start in range(0, len(flat), size):
            part = flat[start : start + size]
            block = np.empty(len(part), self.dtype)
            _read_into(stream, block)
            with np.errstate(over="ignore"):  # infinite values are reported by who reads them
                part[:] = scaled(block, self.slope, self.intercept)


@dataclass(frozen=True)
class NiftiFile:
    """A NIfTI file whose header was read and whose voxels were not.

    Attributes:
        path: Of the file.
        header: With what nibabel mends mended, without extensions.
        affine: (4, 4), voxel index to millimetres, RAS+.
        pixdim_mm: The three spacings as stored, before anything was mended.
        voxels: Where they lie.
    """

    path: Path
    header: Any
    affine: NDArray[np.float64]
    pixdim_mm: tuple[float, float, float]
    voxels: StoredVoxels


def open_nifti(path: Path) -> NiftiFile:
    """Read and check the header of a NIfTI file.

    Args:
        path: Ends in .nii or .nii.gz, in upper or lower case.

    Returns:
        The file.

    Raises:
        VolumeError: No such file, not a regular one, not readable, empty, damaged, not NIfTI, or
            with a header that contradicts itself.
    """
    _check_regular(path)
    try:
        with _opened(path) as stream:
            raw = stream.read(_LONGEST_HEADER)
    except PermissionError as error:
        raise _forbidden(path) from error
    except gzip.BadGzipFile as error:
        raise VolumeError(f"{path} is not a readable NIfTI file: {error}. {SUPPORTED}") from error
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    kind: Any = next((each for each in _KINDS if each.may_contain_header(raw)), None)
    if kind is None:
        raise VolumeError(f"{path} is not a readable NIfTI file: it has no header. {SUPPORTED}")
    try:
        header = kind(raw[: kind.template_dtype.itemsize], check=False)
        pixdim = np.asarray(header["pixdim"][1:4], float)
        header.check_fix(logger=_SILENT, error_level=logging.ERROR)
        affine = np.asarray(header.get_best_affine(), float)
        slope, intercept = header.get_slope_inter()
        shape = tuple(int(size) for size in header.get_data_shape())
        dtype, offset = np.dtype(header.get_data_dtype()), int(header.get_data_offset())
    except (HeaderDataError, ValueError, OverflowError, TypeError, KeyError) as error:
        raise VolumeError(f"{path} is not a readable NIfTI file: {error}. {SUPPORTED}") from error
    if offset < kind.template_dtype.itemsize:
        raise VolumeError(
            f"{path} is not a readable NIfTI file: by its header, the voxels begin at byte "
            f"{offset}, inside the header. Convert it again from the original."
        )
    # nibabel replaces a zero spacing by 1 mm without a word; with an sform it is not used at all.
    if header["sform_code"] == 0 and not (np.isfinite(pixdim) & (pixdim > 0)).all():
        raise VolumeError(
            f"{path} has spacing {pixdim.tolist()} mm; every spacing must be positive. "
            "Correct pixdim in its header, or convert it again from the original."
        )
    slope = 1.0 if slope is None else slope
    intercept = 0.0 if intercept is None else intercept
    voxels = StoredVoxels(path, shape, dtype, offset, slope, intercept)
    x, y, z = pixdim.tolist()
    return NiftiFile(path, header, affine, (x, y, z), voxels)


def scaled(numbers: NDArray[Any], slope: float, intercept: float) -> NDArray[np.float32]:
    """Compute number × slope + intercept, in double precision where that is not the number itself.

    Args:
        numbers: As stored.
        slope: See above.
        intercept: See above.

    Returns:
        float32 of the same shape; `numbers` themselves if nothing changes.
    """
    if (slope, intercept) == (1, 0):
        return np.asarray(numbers, np.float32)
    short = numbers.dtype.kind in "iu" and numbers.dtype.itemsize <= 2
    if short and slope == 1 and intercept.is_integer() and abs(intercept) < _EXACT:
        values = numbers.astype(np.float32)  # which holds these sums exactly
        values += np.float32(intercept)
        return values
    values = numbers.astype(np.float64)
    if slope != 1:
        values *= slope
    if intercept != 0:  # nor would −0 stay −0
        values += intercept
    return values.astype(np.float32)


def _opened(path: Path) -> BinaryIO:
    compressed = path.name.lower().endswith(".gz")
    return cast(BinaryIO, gzip.open(path, "rb") if compressed else path.open("rb"))


def _check_regular(path: Path) -> None:
    try:
        found = path.stat()
    except PermissionError as error:
        raise _forbidden(path) from error
    except (OSError, ValueError) as error:
        raise VolumeError(f"{path} does not exist. Check the path.") from error
    if stat.S_ISDIR(found.st_mode):
        raise VolumeError(f"{path} is a folder, not a file (a DICOM series?). {SUPPORTED}")
    if not stat.S_ISREG(found.st_mode):
        raise VolumeError(
            f"{path} is no regular file but a pipe, a socket or a device. Give a file on a disk."
        )
    if found.st_size == 0:
        raise VolumeError(f"{path} is an empty file. Copy or download it again.")
    if nifti_stem(path) is None:
        raise VolumeError(f"{path} is not a NIfTI file. {SUPPORTED}")


def _check_size(path: Path, offset: int, shape: tuple[int, ...], itemsize: int) -> None:
    """Refuse a file that is too short for its voxels before memory is taken for them."""
    promised, there = offset + prod(shape) * itemsize, path.stat().st_size
    most = there * _MOST_DEFLATED if path.name.lower().endswith(".gz") else there
    if promised > most:
        raise VolumeError(
            f"{path} is damaged or cut short: by its header it holds {promised:,} bytes, "
            f"{'×'.join(map(str, shape))} voxels; the file has {there:,} bytes. "
            "Copy or download it again."
        )


def _skip(stream: BinaryIO, count: int) -> None:
    while count:
        block = stream.read(min(count, _BLOCK))
        if not block:
            raise EOFError("it ends before the first voxel")
        count -= len(block)


def _read_into(stream: BinaryIO, target: NDArray[Any]) -> None:
    view = memoryview(cast(Any, target.view(np.uint8)))
    done = 0
    while done < len(view):
        count = cast(Any, stream).readinto(view[done : done + _BLOCK])
        if not count:
            raise EOFError("it ends before the last voxel")
        done += count


def _beyond(stream: BinaryIO) -> int:
    """Read to the end, where gzip compares checksum and length; how many bytes that were."""
    beyond = 0
    while block := stream.read(_BLOCK):
        beyond += len(block)
        if beyond > _MOST_BEYOND:
            raise ValueError("far more follows than the voxels that its header promises")
    return beyond


def _too_long(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], beyond: int) -> str:
    return (
        f"{path} holds {beyond:,} bytes more than its header says ({'×'.join(map(str, shape))} "
        f"voxels of {dtype.itemsize} bytes): a part of the scan may be missing or out of place. "
        "Compare it with the original."
    )


def _damaged(path: Path, error: BaseException) -> VolumeError:
    return VolumeError(f"{path} is damaged or cut short: {error}. Copy or download it again.")


def _forbidden(path: Path) -> VolumeError:
    return VolumeError(
        f"{path} may not be read: permission denied. Ask its owner, or change its permissions."
    )
