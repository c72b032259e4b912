"""A DICOM series as a volume, its slices put in order by their positions.

SimpleITK decodes the slices (JPEG, JPEG 2000 and RLE included) and applies slope and intercept. The
geometry is taken from the headers here, because a reader of series takes the distance between
slices for granted, and a lost slice then shifts all that follow.
"""

from __future__ import annotations

import locale
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundation.data.cases import natural_key
from foundation.errors import VolumeError, import_extra, listed

_EVEN = 0.1  # a slice may lie this share of the distance between slices off its even place
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Slice:
    """The header of one file of a series. Lengths and places are in mm, LPS, as DICOM has them.

    Attributes:
        path: Of the file.
        series: Identifier of its series, "" without one.
        modality: E.g. "CT", "" where the header has none.
        instance: Number that the publisher gave it, if any.
        size: Columns and rows.
        spacing_mm: Between columns and between rows.
        position: Centre of the first voxel.
        directions: Of rows (3 numbers) and of columns (3).
    """

    path: Path
    series: str
    modality: str
    instance: int | None
    size: tuple[int, int]
    spacing_mm: tuple[float, float]
    position: tuple[float, float, float]
    directions: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """The slices of a series, in order along the normal of their plane.

    Index x counts columns, y rows, z slices. A tilted gantry makes the affine sheared, as it is.

    Attributes:
        slices: Their headers, in order.
        affine: (4, 4), voxel index to millimetres, RAS+.
    """

    slices: tuple[Slice, ...]
    affine: NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        return (*self.slices[0].size, len(self.slices))

    @property
    def modality(self) -> str:
        """What the headers say, e.g. "CT"."""
        return self.slices[0].modality

    def in_file_order(self) -> list[int]:
        """Indices of the slices in the order in which their publisher numbered them.

        By instance number and by file name, which must not contradict each other.

        Returns:
            Places in `slices`.

        Raises:
            VolumeError: They do, or the instance numbers repeat.
        """
        everyone = range(len(self.slices))
        by_name = sorted(everyone, key=lambda i: natural_key(self.slices[i].path.name))
        numbers = [slice_.instance for slice_ in self.slices]
        if None in numbers:
            return by_name
        folder = self.slices[0].path.parent
        if len(set(numbers)) < len(numbers):
            raise VolumeError(
                f"{folder}: several slices have the same instance number, so that their masks "
                "cannot be told apart. Download the case again."
            )
        by_number = sorted(everyone, key=lambda i: numbers[i] or 0)
        if by_number != by_name:
            raise VolumeError(
                f"{folder}: file names and instance numbers give different orders of the slices, "
                "so that masks numbered from 0 cannot be assigned. Restore the original names."
            )
        return by_number


def read_headers(folder: Path) -> Series:
    """Find the one series in a folder, put its slices in order and check that none is missing.

    Files that are not DICOM are passed over. Where every file has a series identifier of its own,
    as after careless anonymisation, they count as one series.

    Args:
        folder: With the files; those below it are not looked at.

    Returns:
        The series.

    Raises:
        MissingExtraError: SimpleITK is not installed.
        VolumeError: No DICOM file, a damaged one, several series, slices of different size,
            spacing or direction, two at one place, or a missing one.
    """
    slices = _slices_of(folder)
    by_series: dict[str, list[Slice]] = defaultdict(list)
    for each in slices:
        by_series[each.series].append(each)
    if 1 < len(by_series) < len(slices):
        sizes = [f"{len(group)} slices in {uid or 'no id'}" for uid, group in by_series.items()]
        raise VolumeError(
            f"{folder} holds {len(by_series)} DICOM series ({listed(sizes, 3)}); one is needed. "
            "Leave the series that was labelled and move the others elsewhere."
        )
    if len(slices) < 2:
        raise VolumeError(f"{folder} holds a single DICOM slice; give the whole series.")
    for what in ("size", "spacing_mm", "directions"):
        values = Counter(getattr(each, what) for each in slices)
        if len(values) > 1 and not _almost_equal(list(values)):
            raise VolumeError(
                f"{folder}: its slices do not fit together: {what.replace('_mm', ' in mm')} is "
                f"{listed([f'{value} in {n}' for value, n in values.most_common()], 3)} of them. "
                "Is a scout view or another series among them?"
            )
    return _in_order(slices, folder)


def read_pixels(paths: Sequence[Path]) -> NDArray[np.float32]:
    """Decode slices in the order given; slope and intercept are applied.

    Args:
        paths: A DICOM file for each slice.

    Returns:
        (X, Y, Z), float32 HU.

    Raises:
        VolumeError: A file cannot be decoded.
    """
    with _simpleitk() as sitk:
        reader = sitk.ImageSeriesReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetOutputPixelType(sitk.sitkFloat32)
        reader.SetFileNames([str(path) for path in paths])
        try:
            voxels = sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError as error:
            raise VolumeError(
                f"{paths[0].parent}: a DICOM file cannot be decoded ({_last_line(error)}). "
                "Download the series again."
            ) from error
    return np.asarray(voxels.transpose(2, 1, 0), np.float32)


@contextmanager
def _simpleitk() -> Iterator[Any]:
    """SimpleITK, whose DICOM reader leaves the process in the locale "C": it is given back."""
    sitk = import_extra("SimpleITK", "dicom", "Reading DICOM needs")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # uneven slices are judged here
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield sitk
    finally:
        locale.setlocale(locale.LC_ALL, before)


def _slices_of(folder: Path) -> list[Slice]:
    files = [path for path in folder.glob("[!.]*") if path.is_file()]
    slices = []
    with _simpleitk() as sitk:
        for path in sorted(files, key=lambda file: natural_key(file.name)):
            reader = sitk.ImageFileReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetFileName(str(path))
            try:
                reader.ReadImageInformation()
            except RuntimeError as error:
                if _claims_to_be_dicom(path):
                    raise VolumeError(
                        f"{path} is damaged or cut short ({_last_line(error)}). Download it again."
                    ) from error
                continue
            slices.append(_slice_of(path, reader))
    if not slices:
        raise VolumeError(f"{folder} holds no DICOM file.")
    return slices


def _slice_of(path: Path, reader: Any) -> Slice:
    def text(tag: str) -> str:
        return str(reader.GetMetaData(tag)).strip(" \0") if reader.HasMetaDataKey(tag) else ""

    def numbers(tag: str, count: int, what: str) -> tuple[float, ...]:
        try:
            values = tuple(float(value) for value in text(tag).split("\\"))
        except ValueError:
            values = ()
        if len(values) != count:
            raise VolumeError(
                f"{path} does not say {what} (DICOM tag {tag.replace('|', ',')} is "
                f"{text(tag)!r}). It cannot be placed in the body: use another export of the scan."
            )
        return values

    size = reader.GetSize()
    if len(size) > 2 and size[2] > 1:
        raise VolumeError(
            f"{path} holds {size[2]} frames (enhanced DICOM). Convert it with dcm2niix."
        )
    instance = text("0020|0013")
    x, y, z = numbers("0020|0032", 3, "where its slice lies")
    between_rows, between_columns = numbers("0028|0030", 2, "its pixel spacing")
    return Slice(
        path=path,
        series=text("0020|000e"),
        modality=text("0008|0060"),
        instance=int(instance) if instance.lstrip("+-").isdigit() else None,
        size=(int(size[0]), int(size[1])),
        spacing_mm=(between_columns, between_rows),
        position=(x, y, z),
        directions=numbers("0020|0037", 6, "the directions of its rows and columns"),
    )


def _in_order(slices: list[Slice], folder: Path) -> Series:
    first = slices[0]
    along_row, along_column = np.array(first.directions[:3]), np.array(first.directions[3:])
    normal = np.cross(along_row, along_column)
    heights = np.array([np.dot(each.position, normal) for each in slices])
    order = np.argsort(heights, kind="stable")
    positions = np.array([slices[i].position for i in order])
    gaps = np.diff(heights[order])
    usual = float(np.median(gaps))
    close = np.flatnonzero(gaps < _EVEN * usual) if usual > 0 else np.flatnonzero(gaps <= 0)
    if len(close) or usual <= 0:
        pairs = [
            f"{slices[order[i]].path.name} and {slices[order[i + 1]].path.name}" for i in close
        ]
        raise VolumeError(
            f"{folder}: slices lie at the same place: {listed(pairs, 3)}. "
            "Remove the duplicates, or the second series among them."
        )
    wide = np.flatnonzero(gaps > (1 + 5 * _EVEN) * usual)
    if len(wide):
        where = [f"{heights[order[i]]:g} and {heights[order[i + 1]]:g} mm" for i in wide]
        raise VolumeError(
            f"{folder}: slices are missing between {listed(where, 3)}; elsewhere they lie "
            f"{usual:g} mm apart. Download the series again."
        )
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    even = positions[0] + np.arange(len(slices))[:, None] * step
    off_mm = float(np.linalg.norm(positions - even, axis=1).max())
    if off_mm > _EVEN * usual:
        raise VolumeError(
            f"{folder}: its slices are not evenly spaced: {gaps.min():g} to {gaps.max():g} mm "
            f"apart, up to {off_mm:.2g} mm off a regular grid. Use another reconstruction."
        )
    lps = np.eye(4)
    lps[:3, 0] = along_row * first.spacing_mm[0]
    lps[:3, 1] = along_column * first.spacing_mm[1]
    lps[:3, 2] = step
    lps[:3, 3] = positions[0]
    return Series(tuple(slices[i] for i in order), _LPS_TO_RAS @ lps)


def _almost_equal(values: list[tuple[float, ...]]) -> bool:
    """Whether they differ by rounding only; sizes are whole numbers and so never do."""
    table = np.array(values, float)
    return bool(np.ptp(table, axis=0).max() < 1e-3)


def _claims_to_be_dicom(path: Path) -> bool:
    with path.open("rb") as stream:
        return path.suffix.lower() == ".dcm" or stream.read(132)[128:] == b"DICM"


def _last_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1].strip()[:200]
