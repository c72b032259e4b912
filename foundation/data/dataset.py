"""How one dataset is found on disk and read: the cases of a folder, the labels of a case."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundation.data.cases import Case, DatasetWarning, Scan
from foundation.data.layouts import Layout, Survey
from foundation.data.reading import READERS, Image, Labels, read_image
from foundation.errors import UsageError, VolumeError, listed
from foundation.taxonomy import NAMES, Dataset, by_name


@dataclass(frozen=True)
class Adapter:
    """How one dataset is found on disk and read.

    labels_as: how its labels are stored, a key of `reading.READERS`.
    settle: what is special about single cases: the case changed, or why it is left out.
    unused: source labels that have no class, and what they are.
    unknown: source labels whose voxels may be anything.
    open_names: source labels outside of the label map are structures without a class, no faults.
    all_structures: every source label must have a mask in every case.
    prompts: class of the user's own → its prompt.
    paper_cases, used_cases: scans by the paper, and those the published weights were trained on.
    obtain: what to know about getting it, besides the dataset's URL.
    """

    dataset: Dataset
    layout: Layout
    labels_as: str = "label map"
    settle: Callable[[Case, Dataset], Case | str] | None = None
    unused: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    open_names: bool = False
    all_structures: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    paper_cases: int | None = None
    used_cases: int | None = None
    obtain: str = ""

    def survey(self, root: Path) -> tuple[list[Case], Survey, list[str]]:
        """Look through `root`: its cases, what the layout found, and cases left out on purpose."""
        survey = self.layout.survey(root)
        cases, left_out = [], []
        for found in survey.found:
            case: Case | str = Case(
                dataset=self.dataset.id,
                id=found.id,
                image=found.image,
                labels=found.labels,
                annotated=self.dataset.annotated,
                unknown=self.unknown,
                names_file=found.names_file,
                split=found.split,
            )
            if self.settle and isinstance(case, Case):
                case = self.settle(case, self.dataset)
            if isinstance(case, Case):
                cases.append(case)
            else:
                left_out.append(f"{found.id}: {case}")
        return cases, survey, left_out

    def find(self, root: str | Path) -> list[Case]:
        """The complete cases below `root`, in natural order of their ids.

        Raises:
            UsageError: there is none, or `root` is not a folder.

        Warns:
            DatasetWarning: what is left out, because it is incomplete, ambiguous or no CT.
        """
        root = Path(root)
        cases, survey, left_out = self.survey(root)
        faults = [f"{id_}: {text}" for id_, text in survey.faults]
        if not cases:
            why = (
                f" What was found: {listed([*faults, *left_out], 2)}" if faults or left_out else ""
            )
            raise UsageError(
                f"No case of {self.dataset.name} in {root}: expected {self.layout.expected}.{why}"
            )
        for problems, what in ((left_out, "left out"), (faults, "incomplete and left out")):
            if problems:
                warnings.warn(
                    f"{self.dataset.name}: {len(problems)} cases are {what}: {listed(problems, 2)}",
                    DatasetWarning,
                    stacklevel=2,
                )
        return cases

    def read(self, case: Case) -> Scan:
        """Read one case: image and labels on one grid.

        Raises:
            VolumeError: a file cannot be read, the labels are not on the image's grid, or hold a
                value that the label map does not have.
            MissingExtraError: it is DICOM, and SimpleITK is not installed.
        """
        image = read_image(case.image) if case.image else None
        for doubt in image.doubts if image else ():
            warnings.warn(doubt, DatasetWarning, stacklevel=2)
        (labels, names), affine = self.read_labels(case, image)
        if unexpected := self.unexpected(names):
            raise VolumeError(
                f"{case.id} has label {listed(unexpected)}, which is not in the label map of "
                f"{self.dataset.name}: {listed([str(key) for key in self.dataset.label_map], 40)}. "
                "Is it another release, or another dataset?"
            )
        return Scan(image.array if image else None, affine, labels, names)

    def read_labels(self, case: Case, image: Image | None) -> tuple[Labels, NDArray[Any]]:
        """Labels (X, Y, Z) with their names, and the affine (4, 4; RAS+) of their grid."""
        if not case.labels:
            if image is None:
                raise VolumeError(f"{case.id} has neither image nor labels.")
            return (np.zeros(image.array.shape, np.uint8), ((),)), image.affine
        return READERS[self.labels_as](case, image)

    def unexpected(self, names: tuple[tuple[str, ...], ...]) -> list[str]:
        """Which of the source labels nothing is known about."""
        if self.open_names:
            return []
        known = {str(key) for key in self.dataset.label_map} | {*self.unused, *self.unknown}
        return sorted({name for entry in names for name in entry} - known)

    def positive_classes(self, label: str) -> tuple[str, ...]:
        """The classes that a voxel with this source label is positive for; () if it has none.

        A lesion's voxels are its organ's too, where the dataset annotates the organ. A pair of
        sides stands for one of them, to be found by where the voxel lies.
        """
        classes = {str(key): names for key, names in self.dataset.label_map.items()}
        names = classes.get(label, ())
        sides = {"left", "right"} & set(label.split("_"))
        organs: list[str] = []
        for name in names:
            parents = by_name(name).parents if name in NAMES else ()
            if set(parents) & set(names):  # the side is told already
                continue
            for parent in parents:
                side = by_name(parent).laterality
                if parent in self.dataset.annotated and not (side and sides and side not in sides):
                    organs.append(parent)
        return tuple(dict.fromkeys((*names, *organs)))
