"""How one dataset is found on disk and read: the cases of a folder, the labels of a case."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from foundation.data.cases import Case, DatasetWarning, Scan
from foundation.data.layouts import Layout, Survey
from foundation.errors import UsageError, VolumeError, listed

if TYPE_CHECKING:  # listing datasets imports no numpy
    from foundation.data.reading import Image

# What is special about single cases: the case changed, or why it is left out.
Rule = Callable[[Case, "Dataset"], Case | str]


@dataclass(frozen=True)
class Dataset:
    """How one dataset is found on disk and read, and what its labels mean.

    Attributes:
        id: "04", or the name of a dataset of the user's own; it names folders.
        name: For people.
        label_map: Source label (a value, or the name of a structure, in which * stands for any
            characters) → class names. Two names are a merged pair whose sides must be told apart.
        annotated: The classes that its annotators labelled; the loss masks all others.
        layout: How its cases are found.
        labels_as: How its labels are stored, a key of `reading.READERS`.
        rules: What is special about single cases; each takes the case of the one before.
        unused: Source labels that have no class.
        unknown: Source labels whose voxels may be anything.
        open_names: Source labels outside of the label map are structures without a class, no
            faults.
        complete: Every source label must have a mask in every case.
        ct_only: Refuse a scan without a voxel below 0 HU, which a warning names otherwise.
        prompts: Class of the user's own → its prompt, where it has one.
        url, licence, note: Of its publisher. licence: SPDX id, only where it is certain; check the
            source before use.
        obtain: How to get it, where the URL is not enough.
        paper_cases, used_cases: Scans by the paper, and those that the published weights were
            trained on.
    """

    id: str
    name: str
    label_map: Mapping[int | str, tuple[str, ...]]
    annotated: tuple[str, ...]
    layout: Layout
    labels_as: str = "label map"
    rules: tuple[Rule, ...] = ()
    unused: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    open_names: bool = False
    complete: bool = False
    ct_only: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    url: str | None = None
    licence: str | None = None
    note: str = ""
    obtain: str = ""
    paper_cases: int | None = None
    used_cases: int | None = None

    def survey(self, root: Path) -> tuple[list[Case], Survey, list[str]]:
        """Look through a folder for the cases of this dataset.

        Args:
            root: The folder that holds it.

        Returns:
            Its cases; what the layout found; and "case: why" of those left out on purpose.

        Raises:
            UsageError: `root` is no folder, or lacks the index that the layout needs.
        """
        survey = self.layout.survey(root)
        cases, left_out = [], []
        for found in survey.found:
            case: Case | str = replace(
                found, dataset=self.id, annotated=self.annotated, unknown=self.unknown
            )
            for rule in self.rules:
                case = rule(case, self) if isinstance(case, Case) else case
            if isinstance(case, Case):
                cases.append(case)
            else:
                left_out.append(f"{found.id}: {case}")
        return cases, survey, left_out

    def find(self, root: str | Path) -> list[Case]:
        """Return the complete cases below `root`, in natural order of their ids.

        Args:
            root: The folder that holds the dataset.

        Returns:
            The cases.

        Raises:
            UsageError: There is none, or `root` is not a folder.

        Warns:
            DatasetWarning: What is left out, because it is incomplete, ambiguous or no CT.
        """
        root = Path(root)
        cases, survey, left_out = self.survey(root)
        faults = [f"{id_}: {text}" for id_, text in survey.faults]
        if not cases:
            raise UsageError(self.nothing_in(root, [*faults, *left_out]))
        for problems, what in ((left_out, "left out"), (faults, "incomplete and left out")):
            if problems:
                warnings.warn(
                    f"{self.name}: {len(problems)} cases are {what}: {listed(problems, 2)}",
                    DatasetWarning,
                    stacklevel=2,
                )
        return cases

    def nothing_in(self, root: Path, reasons: list[str]) -> str:
        """Word the error about a folder without a case.

        Args:
            root: The folder.
            reasons: Why what was found is no case.

        Returns:
            A sentence with what was expected and what was found.
        """
        why = f" What was found: {listed(reasons, 2)}" if reasons else ""
        return f"No case of {self.name} in {root}: expected {self.layout.expected}.{why}"

    def read(self, case: Case) -> Scan:
        """Read one case: image and labels on one grid.

        Args:
            case: One that `find` gave.

        Returns:
            Its image and labels.

        Raises:
            VolumeError: A file cannot be read, the labels are not on the image's grid, or hold a
                value that the label map does not have; or the scan is no CT where `ct_only`.
            MissingExtraError: It is DICOM, and SimpleITK is not installed.
        """
        from foundation.data.reading import read_image

        image = read_image(case.image) if case.image else None
        for doubt in image.doubts if image else ():
            warnings.warn(doubt, DatasetWarning, stacklevel=2)
        found = self.read_labels(case, image)
        if unexpected := self.unexpected(found.names):
            raise VolumeError(
                f"{case.id} has label {listed(unexpected)}, which is not in the label map of "
                f"{self.name}: {listed([str(key) for key in self.label_map], 40)}. "
                "Is it another release, or another dataset?"
            )
        if self.ct_only and image is not None and image.array.min() >= 0:
            raise VolumeError(
                f"{case.image} has no voxel below 0 HU: an MR, a windowed CT, or one stored "
                "without its intercept of -1024. Give a CT in HU (air near -1000)."
            )
        return replace(found, ct=image.array if image else None)

    def read_labels(self, case: Case, image: Image | None) -> Scan:
        """Read the labels of a case, on the grid of its image.

        Args:
            case: One that `find` gave.
            image: Its scan as read; None where it has none.

        Returns:
            The labels and what their values mean, without the scan.

        Raises:
            VolumeError: A file cannot be read, or is not on the grid of the image.
        """
        from foundation.data.reading import READERS, no_labels

        return READERS[self.labels_as](case, image) if case.labels else no_labels(case, image)

    # --- what labels mean -----------------------------------------------------------------------

    def key_of(self, label: str) -> int | str | None:
        """Return the key of the label map that a source label belongs to: itself, or a pattern.

        Args:
            label: A source label.

        Returns:
            The key; None where there is none.
        """
        return _match(label, self.label_map)

    def classes_of(self, labels: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the classes of each of these source labels that has any.

        Args:
            labels: Source labels.

        Returns:
            Source label → its classes.
        """
        keys = {label: self.key_of(label) for label in labels}
        return {label: self.label_map[key] for label, key in keys.items() if key is not None}

    def without_mask(self, case: Case) -> list[int | str]:
        """Return the source labels of which a case has no mask.

        Args:
            case: One whose structures have a mask each.

        Returns:
            Keys of the label map.
        """
        there = {self.key_of(each.label) for each in case.structures}
        return [key for key in self.label_map if key not in there]

    def unexpected(self, names: tuple[tuple[str, ...], ...]) -> list[str]:
        """Return which of the source labels nothing is known about.

        Args:
            names: Label value → source labels, as a scan has them.

        Returns:
            Source labels, sorted.
        """
        if self.open_names:
            return []
        known = [*self.label_map, *self.unused, *self.unknown]
        return sorted({n for entry in names for n in entry if _match(n, known) is None})


def _match(label: str, keys: Iterable[int | str]) -> int | str | None:
    """Return the first of `keys` that is this label or a pattern with * for it; None if none is."""
    texts = {str(key): key for key in keys}
    if label in texts:
        return texts[label]
    return next((k for text, k in texts.items() if "*" in text and fnmatchcase(label, text)), None)
