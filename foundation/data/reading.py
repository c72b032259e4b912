"""Images and labels of one case from their files, on one grid, with labels as exact integers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundation.data.cases import Case, Scan, natural_key
from foundation.data.dicom import Series, read_headers, read_pixels
from foundation.errors import VolumeError, listed
from foundation.files import nifti_stem
from foundation.imaging.geometry import grid_difference
from foundation.imaging.nifti import open_nifti, scaled
from foundation.imaging.volumes import VolumeWarning, read_ct

_SAME_VOXEL = 0.25  # grids whose corners lie this near, in voxels, are one grid


@dataclass(frozen=True)
class Image:
    """A scan as read, in the order of its file.

    Attributes:
        array: (X, Y, Z), float32 HU.
        affine: (4, 4), voxel index to millimetres, RAS+.
        series: The headers, where it came from DICOM.
        doubts: Why its values may not be HU.
    """

    array: NDArray[np.float32]
    affine: NDArray[np.float64]
    series: Series | None = None
    doubts: tuple[str, ...] = ()


def read_image(path: Path) -> Image:
    """Read a NIfTI file, or a folder with one DICOM series.

    Args:
        path: Of either.

    Returns:
        The scan.

    Raises:
        VolumeError: It cannot be read, or is no volume with a place in the body.
        MissingExtraError: It is DICOM, and SimpleITK is not installed.
    """
    series = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if path.is_dir():
            series = read_headers(path)
            pixels = read_pixels([each.path for each in series.slices])
            try:
                volume = read_ct((pixels, series.affine))
            except VolumeError as error:
                raise VolumeError(f"{path}: {error}") from error
        else:
            volume = read_ct(path)
    doubts = [str(w.message) for w in caught if issubclass(w.category, VolumeWarning)]
    if series is not None:
        doubts = [doubt.replace("The given tuple", str(path)) for doubt in doubts]
        if series.modality not in ("CT", ""):
            doubts.append(f"{path} is {series.modality} by its DICOM headers, not CT.")
    return Image(volume.array, volume.affine, series, tuple(doubts))


def read_label_map(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read a NIfTI file with labels.

    Args:
        path: Of the file.

    Returns:
        Labels (X, Y, Z), uint8 or uint16; and their affine (4, 4), voxel index to mm, RAS+.

    Raises:
        VolumeError: Missing, damaged, not 3-D, or not whole numbers from 0 to 65535.
    """
    if nifti_stem(path) is None:
        raise VolumeError(f"{path} is not a NIfTI file (.nii, .nii.gz).")
    file = open_nifti(path)
    shape, affine = file.voxels.shape, file.affine
    if len(shape) < 3 or min(shape) < 1 or any(length != 1 for length in shape[3:]):
        raise VolumeError(f"{path} has shape {shape}; labels are one 3-D volume.")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise VolumeError(f"{path} has an affine without volume. Correct its header.")
    if file.voxels.dtype.kind not in "biuf":
        raise VolumeError(f"{path} holds {file.voxels.dtype}; labels are whole numbers.")
    numbers, doubts = file.voxels.read()
    for doubt in doubts:
        warnings.warn(doubt, VolumeWarning, stacklevel=2)
    values = numbers.stored.reshape(shape[:3], order="F")
    if (numbers.slope, numbers.intercept) != (1, 0):
        values = scaled(values, numbers.slope, numbers.intercept)
    return _as_labels(values, path), affine


def _as_labels(values: NDArray[Any], path: Path) -> NDArray[Any]:
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        broken = values[values != np.rint(values)]  # NaN is unequal to itself, so it shows here
        if broken.size:
            raise VolumeError(
                f"{path} holds {float(broken.flat[0]):g}: labels are whole numbers. Was it "
                "resampled by interpolation? Use the original file."
            )
    if low < 0 or high > 65535:
        raise VolumeError(f"{path} holds labels from {low:g} to {high:g}; allowed are 0 to 65535.")
    return values.astype(np.uint8 if high < 256 else np.uint16, copy=False)


def count_values(labels: NDArray[np.unsignedinteger], values: int) -> NDArray[np.int64]:
    """Count the voxels of each label value; plane by plane, which needs little memory.

    Args:
        labels: (X, Y, Z), below `values`.
        values: How many values there are, 0 among them.

    Returns:
        Voxels of each value, (values,).
    """
    counts = np.zeros(values, np.int64)
    for plane in np.moveaxis(labels, int(np.argmax(labels.strides)), 0):  # each of one piece
        counts += np.bincount(plane.ravel(order="K"), minlength=values)
    return counts


def onto_grid(
    labels: NDArray[Any], affine: NDArray[np.float64], image: Image, path: Path
) -> NDArray[Any]:
    """Return labels in the order of the image's voxels.

    Where the two files hold the same voxels with other axes first or running the other way, and
    their affines agree, the labels are turned; nothing is resampled.

    Args:
        labels: (X, Y, Z), whole numbers.
        affine: (4, 4) of the labels, voxel index to millimetres, RAS+.
        image: The scan whose grid is wanted.
        path: Of the labels, for an error.

    Returns:
        Labels (X, Y, Z) of the image's shape.

    Raises:
        VolumeError: The two grids are not the same voxels.
    """
    turned = turned_to(labels, affine, image.affine, image.array.shape)
    if turned is not None:
        return turned
    unlike = grid_difference(affine, labels.shape, image.affine, image.array.shape)
    raise VolumeError(
        f"{path} is not on the grid of its image: {unlike}. "
        "Labels must be given voxel for voxel: correct the header that is wrong, or use files of "
        "the same release."
    )


def turned_to(
    labels: NDArray[Any],
    affine: NDArray[np.float64],
    grid_affine: NDArray[np.float64],
    grid_shape: tuple[int, ...],
) -> NDArray[Any] | None:
    """Return labels in the order of another grid's voxels, where both grids are the same voxels.

    Args:
        labels: (X, Y, Z), whole numbers.
        affine: (4, 4) of the labels, voxel index to millimetres, RAS+.
        grid_affine: (4, 4) of the grid that is wanted.
        grid_shape: Its voxels.

    Returns:
        Labels of the grid's shape, turned and not resampled; None where the voxels are others.
    """
    to_image = np.linalg.inv(grid_affine) @ affine
    turn = np.rint(to_image[:3, :3])
    shape = np.array(grid_shape)
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(labels.shape) - 1)
    lands = corners @ to_image[:3, :3].T + to_image[:3, 3]
    is_turn = bool((np.abs(turn).sum(0) == 1).all() and (np.abs(turn).sum(1) == 1).all())
    if is_turn:
        wanted = corners @ turn.T + np.where(turn.sum(1) < 0, shape - 1, 0)
        same = (np.abs(turn) @ labels.shape == shape).all()
        if same and np.abs(lands - wanted).max() <= _SAME_VOXEL:
            axes = [int(np.flatnonzero(row)[0]) for row in turn]
            flips = tuple(slice(None, None, -1 if row.sum() < 0 else 1) for row in turn)
            return np.ascontiguousarray(labels.transpose(axes)[flips])
    return None


def overlay(
    shape: tuple[int, ...], masks: Iterable[tuple[str, NDArray[np.bool_]]]
) -> tuple[NDArray[Any], tuple[tuple[str, ...], ...]]:
    """Merge masks of structures, which may overlap, into one volume of values and their names.

    Masks are taken one at a time, so that a hundred structures need the memory of two.

    Args:
        shape: X, Y, Z.
        masks: Name of a structure and its mask (X, Y, Z).

    Returns:
        Label values (X, Y, Z; uint8 or uint16), and the structures of each value.

    Raises:
        VolumeError: There are more than 65535 combinations of structures.
    """
    labels = np.zeros(shape, np.uint16)
    names: list[tuple[str, ...]] = [()]
    index: dict[tuple[str, ...], int] = {(): 0}
    for name, mask in masks:
        below = labels[mask]
        table = np.zeros(len(names), np.uint16)
        for value in np.unique(below):
            both = (*names[value], name)
            if both not in index:
                if len(names) > 65535:
                    raise VolumeError(f"{name}: more than 65535 combinations of structures.")
                index[both] = len(names)
                names.append(both)
            table[value] = index[both]
        labels[mask] = table[below]
    kept = np.union1d([0], np.unique(labels))  # some combinations were overlaid completely
    renumber = np.zeros(len(names), np.uint8 if len(kept) < 257 else np.uint16)
    renumber[kept] = np.arange(len(kept))
    return renumber[labels], tuple(names[value] for value in kept)


# --- one function per way in which labels are stored ---------------------------------------------


def no_labels(case: Case, image: Image | None) -> Scan:
    """Return labels of which every voxel is background.

    Args:
        case: One without labels.
        image: Its scan.

    Returns:
        The labels and what their values mean, without the scan.

    Raises:
        VolumeError: It has no scan either.
    """
    if image is None:
        raise VolumeError(f"{case.id} has neither image nor labels.")
    return Scan(None, image.affine, np.zeros(image.array.shape, np.uint8), ((),))


def labels_from_map(case: Case, image: Image | None) -> Scan:
    """Read one NIfTI file with a number for each structure.

    `case.names_file` may name the numbers.

    Args:
        case: What to read.
        image: Its scan as read; None where it has none.

    Returns:
        The labels and what their values mean, without the scan.

    Raises:
        VolumeError: A file cannot be read, is not on the grid of the image, or has a number without
            a name.
    """
    labels, affine = read_label_map(case.labels[0])
    if image is not None:
        labels, affine = onto_grid(labels, affine, image, case.labels[0]), image.affine
    known = read_names(case.names_file) if case.names_file else {}
    counts = count_values(labels, int(labels.max()) + 1)
    used = {int(value) for value in np.flatnonzero(counts) if value}
    nameless = [str(value) for value in sorted(used) if value not in known]
    if case.names_file and nameless:
        raise VolumeError(
            f"{case.labels[0]} has label {listed(nameless)}, which {case.names_file.name} does not "
            "name. Add the name, or correct the labels."
        )
    names = tuple(
        (known.get(value, str(value)),) if value in used else () for value in range(len(counts))
    )
    return Scan(None, affine, labels, names)


def labels_from_masks(case: Case, image: Image | None) -> Scan:
    """Read a NIfTI file for each structure, or single values of label maps.

    Args:
        case: What to read, see `Case.structures`.
        image: Its scan as read; None where it has none.

    Returns:
        The labels and what their values mean, without the scan.

    Raises:
        VolumeError: A file cannot be read, or is not on the grid of the image.
    """
    if image is None:
        mask, affine = read_label_map(case.labels[0])
        image = Image(np.broadcast_to(np.float32(0), mask.shape), affine)

    def masks() -> Iterator[tuple[str, NDArray[np.bool_]]]:
        for each in case.structures:
            labels, affine = read_label_map(each.path)
            labels = onto_grid(labels, affine, image, each.path)
            yield each.label, labels > 0 if each.value is None else labels == each.value

    return Scan(None, image.affine, *overlay(image.array.shape, masks()))


def labels_from_slices(case: Case, image: Image | None) -> Scan:
    """Read one picture for each slice, numbered as the slices of the DICOM series are.

    What is not black is inside.

    Args:
        case: What to read.
        image: Its scan as read; None where it has none.

    Returns:
        The labels and what their values mean, without the scan.

    Raises:
        VolumeError: A picture cannot be read, or is not of its slice's size; or their numbers
            differ.
    """
    from PIL import Image as Picture

    series = _series_of(case, image)
    order = series.in_file_order()
    paths = sorted(case.labels, key=lambda path: natural_key(path.name))
    if len(paths) != len(order):
        raise VolumeError(
            f"{paths[0].parent} holds {len(paths)} masks for {len(order)} slices in {case.image}. "
            "Each slice needs its mask: download the case again."
        )
    labels = np.zeros(series.shape, np.uint8)
    for path, place in zip(paths, order, strict=True):
        try:
            with Picture.open(path) as picture:
                rows = np.asarray(picture)
        except (OSError, SyntaxError) as error:
            raise VolumeError(f"{path} is damaged: {error}. Download it again.") from error
        inside = (rows.reshape(*rows.shape[:2], -1)[..., :3] > 0).any(-1).T
        if inside.shape != series.shape[:2]:
            raise VolumeError(
                f"{path} has {inside.shape[0]}×{inside.shape[1]} pixels; its slice has "
                f"{series.shape[0]}×{series.shape[1]}."
            )
        labels[:, :, place] = inside
    return Scan(None, series.affine, labels, ((), ("1",)))


def labels_from_dicom_masks(case: Case, image: Image | None) -> Scan:
    """Read a folder of DICOM masks for each structure, whose files are named as those of the scan.

    Args:
        case: What to read.
        image: Its scan as read; None where it has none.

    Returns:
        The labels and what their values mean, without the scan.

    Raises:
        VolumeError: A mask is missing, cannot be read, or is not on the grid of the image.
    """
    series = _series_of(case, image)
    folders: dict[Path, dict[str, Path]] = {}
    for path in case.labels:
        folders.setdefault(path.parent, {})[path.name] = path

    def masks() -> Iterator[tuple[str, NDArray[np.bool_]]]:
        for folder, files in sorted(folders.items()):
            lost = [s.path.name for s in series.slices if s.path.name not in files]
            if lost:
                raise VolumeError(
                    f"{folder} lacks the masks of {len(lost)} slices: {listed(lost, 3)}. "
                    "Download the case again."
                )
            mask = read_pixels([files[each.path.name] for each in series.slices]) > 0
            if mask.shape != series.shape:
                raise VolumeError(
                    f"{folder} is not on the grid of its image: shape {mask.shape}, not "
                    f"{series.shape}."
                )
            yield folder.name, mask

    return Scan(None, series.affine, *overlay(series.shape, masks()))


READERS = {
    "label map": labels_from_map,
    "masks": labels_from_masks,
    "slices": labels_from_slices,
    "dicom masks": labels_from_dicom_masks,
}


def _series_of(case: Case, image: Image | None) -> Series:
    if image is None or image.series is None:
        raise VolumeError(f"{case.image} is no DICOM series; these labels need one.")
    return image.series


def read_names(path: Path) -> dict[int, str]:
    """Read the names of label values from a JSON object, whose keys are numbers as text.

    Args:
        path: Of the file.

    Returns:
        Label value → name.

    Raises:
        VolumeError: It cannot be read as that.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {int(value): str(name) for value, name in content.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise VolumeError(
            f'{path} cannot be read as names of labels, {{"1": "liver", …}}: {error}.'
        ) from error
