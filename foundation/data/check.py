"""What is wrong with a dataset on disk, in words, and what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from foundation.data.cases import Case, Scan, natural_key
from foundation.data.dataset import Dataset
from foundation.data.meaning import meaning
from foundation.data.reading import Image, count_values, read_image
from foundation.errors import UsageError, VolumeError, listed
from foundation.taxonomy import PAIRED, by_name, in_order

_CHECK_HU = -300.0  # roughly above it: the body, in a thinned CT whose middle alone counts
_WRONG_SIDE_MM = 15.0  # an organ's centre this far beyond the body's middle is on the wrong side
_SQUARE_DEGREES = 1.0
_SEEN_ML = 1.0  # less of an organ than this, cut off by the field of view, says nothing of sides
_MOST_LABELS = 200  # named in a note


@dataclass
class CaseReport:
    """What one case holds and what is wrong with it.

    Attributes:
        id: Of the case.
        shape, orientation: Of the file's axes, e.g. "LPS".
        spacing_mm: Along them.
        hu: 0.5 % and 99.5 % of the voxels lie below; None without a scan.
        voxels: Class → count.
        labels: Source labels that occur.
        faults: What is wrong, in words.
    """

    id: str
    shape: tuple[int, ...] = ()
    orientation: str = ""
    spacing_mm: tuple[float, ...] = ()
    hu: tuple[float, float] | None = None
    voxels: dict[str, int] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What a folder holds of a dataset.

    Attributes:
        dataset, name, folder: What was looked at, and where.
        cases: Each that was read.
        faults: "case: what is wrong", of all cases.
        notes: What was left out, how labels were read, and what no case has.
    """

    dataset: str
    name: str
    folder: str
    cases: list[CaseReport] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> dict[str, tuple[int, int]]:
        """Class → in how many cases, and how many voxels. A pair in one label is its organ."""
        counted: dict[str, tuple[int, int]] = {}
        for case in self.cases:
            for name, voxels in case.voxels.items():
                cases, before = counted.get(name, (0, 0))
                counted[name] = (cases + 1, before + voxels)
        return {name: counted[name] for name in in_order(counted)}

    @property
    def orientations(self) -> dict[str, int]:
        """Directions of the files' axes → number of cases."""
        return dict(Counter(c.orientation for c in self.cases if c.orientation).most_common())

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Return the smallest and the largest spacing of each axis, and HU, over all cases.

        Returns:
            What it is, with its unit → smallest and largest value.
        """
        spacings = [case.spacing_mm for case in self.cases if case.spacing_mm]
        found: dict[str, tuple[float, float]] = {}
        for axis, values in zip("xyz", zip(*spacings, strict=True), strict=False):
            found[f"spacing {axis} (mm)"] = (min(values), max(values))
        hu = [case.hu for case in self.cases if case.hu]
        if hu:
            found["HU (0.5 % to 99.5 %)"] = (min(low for low, _ in hu), max(top for _, top in hu))
        return found


def check_dataset(
    dataset: Dataset,
    root: str | Path,
    *,
    limit: int | None = None,
    progress: Callable[[Iterable[Case]], Iterable[Case]] = iter,
) -> Report:
    """Look at the cases of a dataset and say what is wrong with them.

    Args:
        dataset: Which it is.
        root: The folder that holds it.
        limit: Read only so many cases, the first ones.
        progress: Is given the cases and gives them back, one at a time.

    Returns:
        What the folder holds, and what is wrong with it.

    Raises:
        UsageError: Nothing of the dataset lies there.
        MissingExtraError: It is DICOM, and SimpleITK is not installed.
    """
    root = Path(root)
    cases, survey, left_out = dataset.survey(root)
    report = Report(dataset.id, dataset.name, str(root))
    report.faults = [f"{id_}: {text}" for id_, text in survey.faults]
    if left_out:
        report.notes.append(f"{len(left_out)} cases are left out: {listed(left_out, 3)}")
    if not cases and not report.faults:
        raise UsageError(dataset.nothing_in(root, left_out))
    for case in progress(cases[:limit]):
        report.cases.append(check_case(dataset, case))
    report.faults += [f"{each.id}: {text}" for each in report.cases for text in each.faults]
    labels = sorted({label for case in report.cases for label in case.labels}, key=natural_key)
    classes = dataset.classes_of(labels)
    read = [f"{label} as {' and '.join(names)}" for label, names in classes.items()]
    ignored = [label for label in labels if label not in classes and label not in dataset.unknown]
    for what, found in (("labels read", read), ("labels ignored, of no class", ignored)):
        if found:
            report.notes.append(f"{what}: {listed(found, _MOST_LABELS)}")
    if limit is None and report.cases:
        never = [n for n in _merged(dataset) if n not in report.classes]
        if never:
            report.notes.append(f"annotated, but in no case: {listed(never, 40)}")
    return report


def check_case(dataset: Dataset, case: Case) -> CaseReport:
    """Read one case and say what is wrong with it; nothing that it holds makes this fail.

    Args:
        dataset: That it belongs to.
        case: As the dataset found it.

    Returns:
        What it holds, and what is wrong with it.

    Raises:
        MissingExtraError: It is DICOM, and SimpleITK is not installed.
    """
    report = CaseReport(case.id)
    image: Image | None = None
    if case.image:
        try:
            image = read_image(case.image)
        except (VolumeError, OSError, MemoryError) as error:
            report.faults.append(f"unreadable image: {error}")
            return report  # labels cannot be judged without its grid
        low, high = np.percentile(image.array[::2, ::2, ::2], (0.5, 99.5))
        report.hu = (float(low), float(high))
        report.faults += [f"image not in HU? {doubt}" for doubt in image.doubts]
        _describe(report, image.array.shape, image.affine)
    if dataset.complete and (lost := dataset.without_mask(case)):
        names = listed([str(key) for key in lost])
        report.faults.append(f"missing labels: there is no mask of {names}.")
    try:
        found = dataset.read_labels(case, image)
    except (VolumeError, OSError, MemoryError) as error:
        report.faults.append(f"unusable labels: {error}")
        return report
    if image is None:
        _describe(report, found.labels.shape, found.affine)
    if case.labels:
        _check_labels(dataset, report, image, found)
    return report


def _describe(report: CaseReport, shape: tuple[int, ...], affine: NDArray[np.float64]) -> None:
    report.shape = tuple(shape)
    report.orientation = "".join(nib.aff2axcodes(affine))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    report.spacing_mm = tuple(round(float(mm), 4) for mm in spacing)
    cosines = (affine[:3, :3] / spacing).T @ (affine[:3, :3] / spacing) - np.eye(3)
    off = float(np.rad2deg(np.arcsin(np.abs(cosines).max())))
    if off > _SQUARE_DEGREES:
        report.faults.append(
            f"unusable geometry: its axes are not square to each other (up to {off:.0f}° off), as "
            "after a tilted gantry. Resample it to a rectangular grid first."
        )


def _check_labels(dataset: Dataset, report: CaseReport, image: Image | None, found: Scan) -> None:
    """Empty labels, values that mean nothing, and organs on the wrong side."""
    labels, names, affine = found.labels, found.names, found.affine
    counts = count_values(labels, len(names))
    if not counts[1:].any():
        report.faults.append("empty labels: no voxel is labelled.")
        return
    report.labels = sorted({name for value in np.flatnonzero(counts) for name in names[value]})
    if strange := [name for name in dataset.unexpected(names) if name in report.labels]:
        known = [str(key) for key in dataset.label_map]
        report.faults.append(
            f"label values that are not in the label map: {listed(strange)}; known are "
            f"{listed(known, 40)}."
        )
    looked_at, places = _centres(labels, len(names), affine)
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    centres: dict[str, NDArray[np.float64]] = {}
    for name, values in _values_by_class(dataset, names).items():
        voxels = int(counts[values].sum())
        if voxels:
            report.voxels[name] = voxels
        if voxels * voxel_ml >= _SEEN_ML and looked_at[values].any():
            centres[name] = np.average(places[values], axis=0, weights=looked_at[values])
    middle = _body_middle(image, looked_at, places)
    report.faults += _side_faults(centres, middle)


def _centres(
    labels: NDArray[np.generic], values: int, affine: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Centre (V, 3) of each value, mm in RAS, from the number (V,) of voxels looked at.

    Large label maps are thinned out: a centre needs no more.
    """
    step = [max(1, size // 128) for size in labels.shape]
    thin = labels[tuple(slice(None, None, each) for each in step)]
    index = np.zeros((values, 3))
    counts = np.zeros(values, np.int64)
    for axis in range(3):
        for i, slab in enumerate(np.moveaxis(thin, axis, 0)):
            found = np.bincount(slab.ravel(order="K"), minlength=values)
            index[:, axis] += i * step[axis] * found
            counts += found if axis == 0 else 0
    index /= np.maximum(counts, 1)[:, None]
    return counts, index @ affine[:3, :3].T + affine[:3, 3]


def _values_by_class(
    dataset: Dataset, names: tuple[tuple[str, ...], ...]
) -> dict[str, NDArray[np.int64]]:
    """Class → the label values of its voxels; a pair whose sides are one label is its organ."""
    classes = dataset.classes_of({label for labels in names for label in labels})
    annotated = {*dataset.annotated, *(name for found in classes.values() for name in found)}
    values: dict[str, list[int]] = {}
    for value, labels in enumerate(names):
        meant = meaning(labels, classes, annotated)
        for name in meant.classes | meant.undecided:
            values.setdefault(name, []).append(value)
    return {name: np.array(found) for name, found in values.items()}


def _body_middle(
    image: Image | None, counts: NDArray[np.int64], places: NDArray[np.float64]
) -> float:
    """Where the middle of the body lies on the axis to the right, in mm."""
    if image is not None:
        step = tuple(slice(None, None, max(1, n // 64)) for n in image.array.shape)
        body = np.argwhere(image.array[step] > _CHECK_HU)
        if len(body):
            inside = body.mean(0) * [s.step for s in step]
            return float(image.affine[0, :3] @ inside + image.affine[0, 3])
    return float((places[1:, 0] * counts[1:]).sum() / max(1, counts[1:].sum()))


def _side_faults(centres: dict[str, NDArray[np.float64]], middle_mm: float) -> list[str]:
    """Organs on the wrong side of the body: a mirrored scan, or sides that were mixed up."""
    faults = []
    for pair in PAIRED.values():
        right, left = sorted(pair, key=lambda name: by_name(name).laterality != "right")
        if right in centres and left in centres and centres[right][0] <= centres[left][0]:
            faults.append(f"{right} lies left of {left}: are the labels of the two sides swapped?")
            continue
        for name, sign in ((right, 1), (left, -1)):
            if name in centres and sign * (centres[name][0] - middle_mm) < -_WRONG_SIDE_MM:
                beyond = abs(centres[name][0] - middle_mm)
                faults.append(
                    f"{name} lies {beyond:.0f} mm beyond the middle of the body, on the other side."
                )
    if {"liver", "spleen"} <= centres.keys() and centres["liver"][0] <= centres["spleen"][0]:
        faults.append(
            "the liver lies left of the spleen: the scan is mirrored (or the patient has situs "
            "inversus)."
        )
    return faults


def _merged(dataset: Dataset) -> list[str]:
    """The annotated classes as they are counted: a pair that is one label as its organ."""
    merged = {organ for organ, pair in PAIRED.items() if pair in dataset.label_map.values()}
    sides = {name for organ in merged for name in PAIRED[organ]}
    names = [name for name in dataset.annotated if name not in sides]
    return [*names, *sorted(merged)]
