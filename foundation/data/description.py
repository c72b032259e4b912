"""The description of a dataset: a YAML file with where its cases lie and what its labels mean.

    name: my-ct
    licence: CC-BY-4.0
    layout: nifti
    images: "imagesTr/{id}_0000.nii.gz"
    labels: "labelsTr/{id}.nii.gz"
    classes:
      1: liver
      2: [liver, liver_tumor]
      3: {name: vertebra L1, prompt: A computerized tomography of a vertebra L1}
      4: []                              # labelled, but no class
    annotated: [liver, liver_tumor]      # default: every class above
    unknown: [7]                         # labels whose voxels may be anything

The datasets of the paper in `paper/` have this format too. `Description` lists every key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from foundation.config import check_class_name
from foundation.data.cases import Case, safe_id
from foundation.data.dataset import Dataset, Rule
from foundation.data.hooks import HOOKS
from foundation.data.layouts import (
    DatasetJson,
    Layout,
    Listed,
    ListedCase,
    Patterns,
    check_pattern,
)
from foundation.errors import UsageError
from foundation.settings import did_you_mean, read, read_file
from foundation.taxonomy import NAMES, TOTALSEGMENTATOR, classes_of

# Layout → how labels are stored. Where names of files or folders name the labels, no value does.
_LABELS_AS = {"per-structure": "masks", "slices": "slices", "dicom-masks": "dicom masks"}
_BY_NAME = ("per-structure", "dicom-masks")
_MOST_WEIGHT = 1e6


@dataclass(frozen=True)
class OwnClass:
    """A class that is not among the 32.

    Attributes:
        name: Of the class.
        prompt: The sentence that is embedded; each training makes one from the name if not given.
    """

    name: str
    prompt: str | None = None

    def __post_init__(self) -> None:
        check_class_name(self.name, self.prompt)


@dataclass(frozen=True)
class CaseSettings:
    """What differs in a single case. {id} in a path stands for the case's name.

    Attributes:
        image, labels: Paths, for `layout: cases`; false where the case has none. With
            `image: false` the label map alone is read, in every layout.
        annotated, unknown, weight, licence, names_file: As in `Description`.
    """

    image: str | Literal[False] | None = None
    labels: str | Literal[False] | None = None
    annotated: tuple[str, ...] | None = None
    unknown: tuple[int | str, ...] | None = None
    names_file: str | None = None
    weight: float | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        _check_weight(self.weight)


@dataclass(frozen=True)
class Description:
    """A dataset as its YAML file describes it.

    Attributes:
        name: Of the dataset. It names folders, unless `id` does.
        id: A short name for folders and the command line.
        licence, url, note, obtain: See `Dataset`.
        layout: How its files lie. nifti: a label map for each image. nnunet: the same by nnU-Net's
            names. index: a dataset.json lists images and labels, as the Decathlon's.
            per-structure: a mask for each structure. dicom-masks: a folder of DICOM masks for each
            structure. slices: a picture for each slice. cases: only the cases that are given.
        images, labels: Patterns of paths, or several each. {id} is the case (digits only:
            {number}), * and ? stand for parts of a name, **/ for any folders. A pattern of images
            that ends in "/" means folders with a DICOM series.
        names_file: Pattern of the JSON file of each case that names its label values.
        folder, lists: Of the index; see `layouts.DatasetJson`.
        splits: Name of a CSV table with the columns image_id and split.
        classes: Label → class, several, or none. A label is a value; in per-structure and
            dicom-masks the name of a structure, in which * stands for any characters
            ("livertumor*"). A class has one of the 32 names, or is one of your own.
        annotated: The classes that are wholly labelled; all of `classes` if not given.
        unknown: Labels whose voxels may be anything.
        vocabulary: "totalsegmentator" adds its names of structures to `classes`.
        complete: Every label must have a mask in every case.
        rule: What is special about single cases, one of `hooks.HOOKS`.
        weight: How often to draw a case.
        cases: Name of a case → what differs in it.
        paper_cases, used_cases: See `Dataset`.
    """

    name: str
    id: str | None = None
    licence: str | None = None
    url: str | None = None
    note: str | None = None
    obtain: str | None = None
    layout: Literal[
        "nifti", "nnunet", "index", "per-structure", "dicom-masks", "slices", "cases"
    ] = "nifti"
    images: str | tuple[str, ...] | None = None
    labels: str | tuple[str, ...] | None = None
    names_file: str | None = None
    folder: str | None = None
    lists: tuple[str, ...] | None = None
    splits: str | None = None
    classes: Mapping[str, str | OwnClass | tuple[str | OwnClass, ...]] | None = None
    annotated: tuple[str, ...] | None = None
    unknown: tuple[int | str, ...] | None = None
    vocabulary: Literal["totalsegmentator"] | None = None
    complete: bool = False
    rule: str | None = None
    weight: float = 1.0
    cases: Mapping[str, CaseSettings | None] | None = None
    paper_cases: int | None = None
    used_cases: int | None = None

    def __post_init__(self) -> None:
        key, given = ("name", self.name) if self.id is None else ("id", self.id)
        if safe_id(given) != given:
            raise UsageError(
                f"{key} is {given!r}; give letters, digits, '-', '_' and '.': it names folders."
            )
        if self.rule is not None and self.rule not in HOOKS:
            raise UsageError(
                f"rule is {self.rule!r}.{did_you_mean(self.rule, HOOKS)} "
                f"Choose from {', '.join(HOOKS)}."
            )
        wrong = ("images", "labels") if self.layout == "index" else ("folder", "lists")
        if useless := [key for key in wrong if getattr(self, key) is not None]:
            raise UsageError(f"{' and '.join(useless)}: layout {self.layout} does not use that.")
        _check_weight(self.weight)


def _check_weight(weight: float | None) -> None:
    if weight is not None and not 0 <= weight < _MOST_WEIGHT:
        raise UsageError(f"weight is {weight}; give a number from 0 on.")


@dataclass(frozen=True)
class Overrides:
    """A rule: single cases have settings of their own.

    Attributes:
        weight: Of all cases.
        cases: Id of a case → what differs in it.
    """

    weight: float
    cases: Mapping[str, CaseSettings]

    def __call__(self, case: Case, _: Dataset) -> Case:
        """Apply the rule, see `dataset.Rule`."""
        own = self.cases.get(case.id, CaseSettings())
        return replace(
            case,
            image=None if own.image is False else case.image,
            annotated=case.annotated if own.annotated is None else own.annotated,
            unknown=case.unknown if own.unknown is None else _texts(own.unknown),
            weight=self.weight if own.weight is None else own.weight,
            licence=own.licence or case.licence,
        )


def read_description(path: Path) -> Dataset:
    """Read the description of a dataset.

    Args:
        path: A YAML file.

    Returns:
        The dataset that it describes.

    Raises:
        UsageError: It cannot be read, or a key or value is not allowed; names it, and what is.
    """
    where = str(path)
    given = read(Description, read_file(path), where)
    try:
        return _dataset(given)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _dataset(given: Description) -> Dataset:
    label_map, prompts, unused = _classes(given)
    classes = tuple(dict.fromkeys(name for names in label_map.values() for name in names))
    cases = {
        name: replace(own, annotated=_annotated(own.annotated, classes, f"annotated of {name}"))
        for name, own in ((n, own or CaseSettings()) for n, own in (given.cases or {}).items())
    }
    overrides = Overrides(given.weight, {safe_id(name): own for name, own in cases.items()})
    rules: tuple[Rule, ...] = (overrides,) if given.rule is None else (HOOKS[given.rule], overrides)
    return Dataset(
        id=given.id or given.name,
        name=given.name,
        label_map=label_map,
        annotated=_all_annotated(given, cases, classes),
        layout=_layout(given, cases),
        labels_as=_LABELS_AS.get(given.layout, "label map"),
        rules=rules,
        unused=unused,
        unknown=_texts(given.unknown or ()),
        open_names=given.vocabulary is not None,
        complete=given.complete,
        prompts={name: prompt for name, prompt in prompts.items() if prompt},
        url=given.url,
        licence=given.licence,
        note=(given.note or "").strip(),
        obtain=(given.obtain or "").strip(),
        paper_cases=given.paper_cases,
        used_cases=given.used_cases,
    )


# --- files ----------------------------------------------------------------------------------------


def _layout(given: Description, cases: Mapping[str, CaseSettings]) -> Layout:
    if given.layout == "index":
        return DatasetJson(given.folder or "", given.lists or ("training",))
    nnunet = given.layout == "nnunet"
    images = _several(given.images or ("imagesTr/{id}_0000.nii.gz" if nnunet else None))
    labels = _several(given.labels or ("labelsTr/{id}.nii.gz" if nnunet else None))
    if given.layout == "cases":
        if not cases:
            raise UsageError("layout is 'cases', but no cases are given.")
        return Listed({name: _listed(own, images, labels, given) for name, own in cases.items()})
    if not labels:
        raise UsageError("labels is missing: the pattern of the files with labels.")
    for pattern in (*images, *labels, *_several(given.names_file)):
        check_pattern(pattern)
    many = given.layout in _LABELS_AS
    return Patterns(images, labels, many, given.splits, given.names_file)


def _listed(
    own: CaseSettings, images: tuple[str, ...], labels: tuple[str, ...], given: Description
) -> ListedCase:
    """The paths of a case that is given; those of all cases where it has none of its own."""

    def chosen(path: str | Literal[False] | None, common: tuple[str, ...]) -> str | None:
        return path or None if path is not None else next(iter(common), None)

    return ListedCase(
        chosen(own.image, images), chosen(own.labels, labels), own.names_file or given.names_file
    )


def _several(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given or ()


def _texts(labels: Iterable[int | str]) -> tuple[str, ...]:
    return tuple(str(label) for label in labels)


# --- classes --------------------------------------------------------------------------------------


def _classes(
    given: Description,
) -> tuple[dict[int | str, tuple[str, ...]], dict[str, str], tuple[str, ...]]:
    """Label map, prompts of classes of the user's own, and labels that have no class."""
    label_map: dict[int | str, tuple[str, ...]] = {}
    if given.vocabulary:
        label_map.update({name: (name,) for name in NAMES})
        label_map.update({label: (name,) for label, name in TOTALSEGMENTATOR.items()})
    prompts: dict[str, str] = {}
    by_name = given.names_file is not None or given.layout in _BY_NAME
    for label, meaning in (given.classes or {}).items():
        if not by_name and not label.isdecimal():
            raise UsageError(
                f"classes has {label!r}; label values are whole numbers. Names need names_file, "
                "or layout: per-structure."
            )
        names: list[str] = []
        for each in meaning if isinstance(meaning, tuple) else (meaning,):
            names += _class(each, prompts, f"classes, label {label}")
        label_map[label if by_name else int(label)] = tuple(dict.fromkeys(names))
    if not any(label_map.values()):
        raise UsageError("no classes. Give {label: class}, or a vocabulary.")
    unused = _texts(label for label, names in label_map.items() if not names)
    return {label: names for label, names in label_map.items() if names}, prompts, unused


def _class(given: str | OwnClass, prompts: dict[str, str], where: str) -> tuple[str, ...]:
    if isinstance(given, OwnClass):
        prompts[given.name] = given.prompt or prompts.get(given.name, "")
        return (given.name,)
    if given in prompts:
        return (given,)
    try:
        return classes_of(given)
    except UsageError as error:
        raise UsageError(
            f"{where}: {error} A class of your own is written {{name: …, prompt: …}}."
        ) from error


def _annotated(
    given: tuple[str, ...] | None, classes: tuple[str, ...], where: str
) -> tuple[str, ...] | None:
    """Canonical names, in the order of the taxonomy, then of the classes of the user's own."""
    if given is None:
        return None
    chosen: set[str] = set()
    for name in given:
        try:
            chosen |= {name} if name in classes else set(classes_of(name))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
    return tuple(name for name in dict.fromkeys((*NAMES, *classes)) if name in chosen)


def _all_annotated(
    given: Description, cases: Mapping[str, CaseSettings], classes: tuple[str, ...]
) -> tuple[str, ...]:
    """What the dataset annotates; where that is not given, what its cases together do."""
    names = given.annotated
    if names is None and given.vocabulary:
        # A vocabulary has more names than a dataset labels: silence must not mean all of them.
        said = [own.annotated for own in cases.values() if own.annotated is not None]
        if given.layout != "cases" or len(said) < len(cases):
            raise UsageError("a vocabulary needs annotated, for all or for each case.")
        names = tuple(name for own in said for name in own)
    return _annotated(classes if names is None else names, classes, "annotated") or ()
