"""A few scans with labels as people have them: which layout a path has, and what it labels.

folders   a folder per case: ct.nii.gz with labels.nii.gz and labels.json ({"1": "liver"}), or with
          one mask per structure beside it or in segmentations/; TotalSegmentator's tree is one,
          whose meta.csv gives the splits
nnunet    nnU-Net's dataset.json, imagesTr, labelsTr; imagesTs with labelsTs is for testing
table     a CSV table with the columns image, label, class; value and split where needed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from foundation.data import nnunet
from foundation.data.cases import Case
from foundation.data.dataset import Dataset
from foundation.data.layouts import INDEX, MAPS, CaseFolders, DatasetJson, Layout
from foundation.data.naming import Naming
from foundation.data.reading import read_names
from foundation.data.table import read_table
from foundation.errors import UsageError, listed
from foundation.files import nifti_stem

LAYOUTS = (
    "a folder per case (ct.nii.gz with labels.nii.gz and labels.json, or with a mask per structure "
    "in segmentations/), nnU-Net's format (dataset.json, imagesTr, labelsTr), TotalSegmentator's "
    "tree, or a CSV table with the columns image, label, class"
)
_KINDS: tuple[tuple[Literal["label map", "masks"], str], ...] = (
    ("label map", "maps"),
    ("masks", "masks"),
)


@dataclass(frozen=True)
class Source:
    """Scans found at a path.

    Attributes:
        layout: What they were found as.
        root: The folder that holds all of them.
        datasets: How they are read.
        labels: Every name of a label that the files give.
        cases: Key in a store → the case as found.
    """

    layout: str
    root: Path
    datasets: tuple[Dataset, ...]
    labels: frozenset[str]
    cases: Mapping[str, Case]


@dataclass(frozen=True)
class WhatIsWanted:
    """A rule: a case annotates what its labels name, and is left out where that is nothing.

    Attributes:
        naming: What labels mean.
        names: Of the labels of every case; None where each case has its own.
        only: Names of the training cases to use; None for all.
        without: Names of cases to leave out.
    """

    naming: Naming
    names: tuple[str, ...] | None = None
    only: frozenset[str] | None = None
    without: frozenset[str] = frozenset()

    def __call__(self, case: Case, dataset: Dataset) -> Case | str:
        """Apply the rule, see `dataset.Rule`."""
        if case.id in self.without:
            return "among those to leave out."
        if self.only is not None and case.split in (None, "train") and case.id not in self.only:
            return "not among the chosen training scans."
        annotated = self.naming.annotated(self.labels(case))
        if not annotated:
            return "none of its labels is of a class to learn or of a known one."
        labels = case.labels
        if dataset.labels_as == "masks" and not case.named:
            labels = tuple(s.path for s in case.structures if self.naming.classes(s.name))
        return replace(case, annotated=annotated, labels=labels)

    def labels(self, case: Case) -> tuple[str, ...]:
        """Return the names of the labels that this case has.

        Args:
            case: As its layout found it.

        Returns:
            The names; values as text where nothing names them.
        """
        if self.names is not None:
            return self.names
        if case.names_file:
            return tuple(read_names(case.names_file).values())
        if case.named or str(nifti_stem(case.labels[0])).lower() not in MAPS:
            return tuple(sorted({each.name for each in case.structures}))
        numbers = [label for each in self.naming.new for label in each.labels if label.isdigit()]
        return tuple(numbers)  # a map without names: its values


def find_source(
    path: Path,
    naming: Naming,
    prefix: str = "",
    only: frozenset[str] | None = None,
    without: frozenset[str] = frozenset(),
) -> Source:
    """Find out which layout a path has, and what its labels are called.

    Args:
        path: A folder or a table.
        naming: The classes to learn and the known ones.
        prefix: Of the names of its datasets in the store.
        only: Names of the training scans to use; None for all.
        without: Names of scans to leave out.

    Returns:
        The scans, and how they are read.

    Raises:
        UsageError: Nothing of a known layout lies there, or a table or index is wrong.
    """
    root, rule = path, WhatIsWanted(naming, only=only, without=without)
    if path.is_file() and path.suffix.lower() == ".csv":
        table = read_table(path)
        layout, root = "a CSV table", table.root
        labels = {each.label: each.name for case in table.cases for each in case.named}
        datasets = [_dataset(f"{prefix}table", "masks", table, rule, labels)]
    elif not path.is_dir():
        raise UsageError(f"{path} is neither a folder nor a CSV table. Give {LAYOUTS}.")
    elif (path / INDEX).is_file():
        layout, found = "nnU-Net's format", nnunet.read_labels(path / INDEX)
        rule = replace(rule, names=tuple(found.values))
        dataset = _dataset(f"{prefix}nnunet", "label map", DatasetJson(tests=True), rule, {})
        label_map = found.label_map(naming.classes)
        datasets = [replace(dataset, label_map=label_map, unknown=found.ignored)]
    else:
        trees = (path / "meta.csv").is_file()
        layout = "TotalSegmentator's tree" if trees else "a folder per case"
        datasets = _folders(path, prefix, rule)
    return _source(layout, root, datasets, rule)


def _folders(root: Path, prefix: str, rule: WhatIsWanted) -> list[Dataset]:
    datasets, faults = [], []
    for labels_as, name in _KINDS:
        layout = CaseFolders(labels_as)
        survey = layout.survey(root)
        faults += [fault for _, fault in survey.faults]
        names = sorted({label for case in survey.found for label in rule.labels(case)})
        if survey.found:
            labels = dict(zip(names, names, strict=True))
            datasets.append(_dataset(prefix + name, labels_as, layout, rule, labels))
    if not datasets:
        why = f" What was found: {listed(faults, 2)}" if faults else ""
        raise UsageError(f"No labelled scan in {root}.{why} Give {LAYOUTS}.")
    return datasets


def _dataset(
    name: str, labels_as: str, layout: Layout, rule: WhatIsWanted, labels: Mapping[str, str]
) -> Dataset:
    """labels: source label as it is read → its name."""
    named = {label: rule.naming.classes(own) for label, own in labels.items()}
    return Dataset(
        name,
        name,
        {label: classes for label, classes in named.items() if classes},
        (),  # each case has its own, by the rule
        layout,
        labels_as=labels_as,
        rules=(rule,),
        open_names=True,
        ct_only=True,
    )


def _source(layout: str, root: Path, datasets: Sequence[Dataset], rule: WhatIsWanted) -> Source:
    cases = {f"{d.id}/{case.id}": case for d in datasets for case in d.layout.survey(root).found}
    ids = {case.id for case in cases.values()}
    if rule.only is not None and (lost := sorted(rule.only - ids)):
        raise UsageError(f"{root} has no scan {listed(lost)}, which were chosen for training.")
    labels = frozenset(label for case in cases.values() for label in rule.labels(case))
    return Source(layout, root, tuple(datasets), labels, cases)
