"""A dataset of one's own: a YAML file says where its cases lie and what its labels mean.

    name: my-ct
    licence: CC-BY-4.0
    layout: nifti                        # nifti, nnunet, per-structure or cases
    images: "imagesTr/{id}_0000.nii.gz"
    labels: "labelsTr/{id}.nii.gz"
    classes:
      1: liver
      2: [liver, liver_tumor]
      3: {name: vertebra L1, prompt: A computerized tomography of a vertebra L1}
      4: []                              # labelled, but no class
    annotated: [liver, liver_tumor]      # default: every class above
    unknown: [7]                         # labels whose voxels may be anything

`vocabulary: totalsegmentator` knows the names of its structures already; `names_file` is a JSON
file per case that names the values. `cases` holds what differs in single cases: image (false for a
label map alone), labels, annotated, unknown, names_file, weight, licence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from foundation.data.cases import Case, safe_id
from foundation.data.dataset import Adapter
from foundation.data.layouts import (
    DatasetJson,
    Found,
    Layout,
    Patterns,
    Survey,
    check_pattern,
    read_dataset_json,
)
from foundation.errors import UsageError, listed
from foundation.taxonomy import NAMES, PAIRED, TOTALSEGMENTATOR, Dataset, resolve

OPEN_DATA = Path(__file__).with_name("open-data.yaml")
_KEYS = (
    *("name", "licence", "url", "note", "layout", "images", "labels", "classes", "annotated"),
    *("unknown", "names_file", "vocabulary", "weight", "cases"),
)
_CASE_KEYS = ("image", "labels", "annotated", "unknown", "names_file", "weight", "licence")
_LAYOUTS = ("nifti", "nnunet", "per-structure", "cases")
_PROMPT = "A computerized tomography of a {name}"


@dataclass(frozen=True)
class Overrides:
    """What a description says about single cases, and about all of them."""

    cases: Mapping[str, Mapping[str, Any]]
    classes: tuple[str, ...]
    weight: float
    where: str

    def __call__(self, case: Case, _: Dataset) -> Case:
        """The case with its own settings."""
        own = self.cases.get(case.id, {})
        annotated = own.get("annotated")
        if annotated is not None:
            where = f"{self.where}: annotated of {case.id}"
            case = replace(case, annotated=_annotated(annotated, self.classes, where))
        return replace(
            case,
            image=None if own.get("image") is False else case.image,
            weight=float(own.get("weight", self.weight)),
            unknown=tuple(str(label) for label in own.get("unknown", case.unknown)),
            licence=own.get("licence", case.licence),
        )


@dataclass(frozen=True)
class Listed:
    """Cases given one by one; {id} in a path stands for the case's name."""

    cases: Mapping[str, Mapping[str, Any]]
    images: str | None = None
    labels: str | None = None
    names_file: str | None = None
    expected: str = field(default="the files of its cases", init=False)

    def survey(self, root: Path) -> Survey:
        """Look for the files of each case; a case without any is not there, which is no fault."""
        survey = Survey()
        for name, own in self.cases.items():
            image = self._path(root, name, own.get("image", self.images))
            labels = self._path(root, name, own.get("labels", self.labels))
            names = self._path(root, name, own.get("names_file", self.names_file))
            if labels is None:
                names = None
            wanted = [path for path in (image, labels, names) if path]
            lost = [str(path) for path in wanted if not path.exists()]
            if lost and len(lost) < len(wanted):
                survey.faults.append((safe_id(name), f"does not exist: {listed(lost)}."))
            elif wanted and not lost:
                files = tuple(path for path in (labels, names) if path)
                survey.found.append(Found(safe_id(name), image, files, None, names))
        return survey.sort()

    @staticmethod
    def _path(root: Path, name: str, pattern: str | bool | None) -> Path | None:
        return root / str(pattern).replace("{id}", name) if pattern else None


def read_yaml(path: Path) -> Adapter:
    """Read the description of a dataset of one's own.

    Raises:
        UsageError: it cannot be read, or says something unknown; names what and what is allowed.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {error}") from error
    where = str(path)
    content = _mapping(content, where)
    _only(content, _KEYS, where)
    name = content.get("name")
    if not isinstance(name, str) or safe_id(name) != name:
        raise UsageError(
            f"{where}: name is {name!r}; give letters, digits, '-', '_' and '.': it names folders."
        )
    layout = content.get("layout", "nifti")
    if layout not in _LAYOUTS:
        raise UsageError(f"{where}: layout is {layout!r}; choose from {', '.join(_LAYOUTS)}.")
    label_map, prompts, unused = _classes(content, where)
    unknown = tuple(str(label) for label in content.get("unknown") or ())
    classes = tuple(dict.fromkeys(n for names in label_map.values() for n in names))
    cases = {str(k): _mapping(v or {}, f"{where}: case {k}") for k, v in _cases(content, where)}
    for case, own in cases.items():
        _only(own, _CASE_KEYS, f"{where}: case {case}")
    annotated = _all_annotated(content, cases, classes, where)
    overrides = Overrides(
        {safe_id(k): v for k, v in cases.items()},
        classes,
        _weight(content.get("weight", 1.0), where),
        where,
    )
    for case, own in cases.items():  # wrong settings show now, not when the case is reached
        _weight(own.get("weight", 1.0), f"{where}: case {case}")
    return Adapter(
        Dataset(
            id=name,
            name=name,
            label_map=label_map,
            annotated=annotated,
            url=content.get("url"),
            licence=content.get("licence"),
            note=str(content.get("note", "")).strip(),
        ),
        _layout(content, layout, cases, where),
        labels_as="masks" if layout == "per-structure" else "label map",
        settle=overrides,
        unused={str(label): "no class" for label in unused},
        unknown=unknown,
        open_names=bool(content.get("vocabulary")),
        prompts=prompts,
    )


def read_nnunet(index: Path) -> Adapter:
    """A dataset in nnU-Net's raw format, whose `dataset.json` names its labels after classes.

    Raises:
        UsageError: a label is named after none of the 32 classes, or the format is another.
    """
    content = read_dataset_json(index)
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise UsageError(f"{index} has no labels: it is not nnU-Net's format.")
    if all(isinstance(name, str) for name in labels.values()):  # version 1 says value → name
        labels = {name: value for value, name in labels.items()}
    label_map: dict[int | str, tuple[str, ...]] = {}
    for name, value in labels.items():
        if isinstance(value, list):
            raise UsageError(
                f"{index}: label {name!r} is a region of several values. Describe the dataset in "
                "YAML, with the classes of each value."
            )
        if int(value) == 0:
            continue
        try:
            label_map[int(value)] = _expanded(name)
        except UsageError as error:
            raise UsageError(
                f"{index}: {error} Or describe the dataset in YAML, where a class may have a name "
                "and a prompt of its own."
            ) from error
    annotated = tuple(dict.fromkeys(n for names in label_map.values() for n in names))
    name = safe_id(index.parent.name)
    return Adapter(
        Dataset(name, name, label_map, annotated, licence=content.get("licence")), DatasetJson()
    )


def _layout(
    content: Mapping[str, Any], layout: str, cases: Mapping[str, Mapping[str, Any]], where: str
) -> Layout:
    nnunet = layout == "nnunet"
    images = content.get("images", "imagesTr/{id}_0000.nii.gz" if nnunet else None)
    labels = content.get("labels", "labelsTr/{id}.nii.gz" if nnunet else None)
    names_file = content.get("names_file")
    if layout == "cases":
        if not cases:
            raise UsageError(f"{where}: layout is 'cases', but no cases are given.")
        return Listed(cases, images, labels, names_file)
    groups = [
        tuple([given] if isinstance(given, str) else given or ()) for given in (images, labels)
    ]
    if not groups[1]:
        raise UsageError(f"{where}: labels is missing: the pattern of the files with labels.")
    for pattern in (*groups[0], *groups[1], *([names_file] if names_file else [])):
        check_pattern(str(pattern))
    return Patterns(groups[0], groups[1], many=layout == "per-structure", names_file=names_file)


def _classes(
    content: Mapping[str, Any], where: str
) -> tuple[dict[int | str, tuple[str, ...]], dict[str, str], list[int | str]]:
    """Label map, prompts of classes of one's own, and labels that have no class."""
    label_map: dict[int | str, tuple[str, ...]] = {}
    vocabulary = content.get("vocabulary")
    if vocabulary not in (None, "totalsegmentator"):
        raise UsageError(f"{where}: vocabulary is {vocabulary!r}; only totalsegmentator is known.")
    if vocabulary:
        label_map.update({name: (name,) for name in NAMES})
        label_map.update({label: (name,) for label, name in TOTALSEGMENTATOR.items()})
    prompts: dict[str, str] = {}
    unused: list[int | str] = []
    given = _mapping(content.get("classes") or {}, f"{where}: classes")
    by_name = bool(content.get("names_file")) or content.get("layout") == "per-structure"
    for label, meaning in given.items():
        if not by_name and not isinstance(label, int):
            raise UsageError(
                f"{where}: classes has {label!r}; label values are whole numbers. Names need "
                "names_file, or layout: per-structure."
            )
        names: list[str] = []
        for each in meaning if isinstance(meaning, list) else [meaning]:
            names += _class(each, prompts, f"{where}: classes, label {label}")
        key = str(label) if by_name else label
        label_map[key] = tuple(dict.fromkeys(names))
        if not names:
            unused.append(key)
    if not any(label_map.values()):
        raise UsageError(f"{where}: no classes. Give {{label: class}}, or a vocabulary.")
    return {key: names for key, names in label_map.items() if names}, prompts, unused


def _class(given: Any, prompts: dict[str, str], where: str) -> tuple[str, ...]:
    if isinstance(given, str):
        if given in prompts:
            return (given,)
        try:
            return _expanded(given)
        except UsageError as error:
            raise UsageError(
                f"{where}: {error} A class of your own is written {{name: …, prompt: …}}."
            ) from error
    own = _mapping(given, where)
    _only(own, ("name", "prompt"), where)
    name = own.get("name")
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"{where}: a class needs a name.")
    prompts[name] = str(own.get("prompt") or _PROMPT.format(name=name))
    return (name,)


def _expanded(name: str) -> tuple[str, ...]:
    """A class by any of its names; both sides where the name has none."""
    merged = name.strip().lower().replace(" ", "_").removesuffix("s")
    return PAIRED[merged] if merged in PAIRED else (resolve(name),)


def _annotated(given: Any, classes: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Canonical names, in the order of the taxonomy, then of the classes of one's own."""
    if given is None:
        chosen = set(classes)
    else:
        if not isinstance(given, list):
            raise UsageError(f"{where} is {given!r}; give a list of classes.")
        chosen = set()
        for name in given:
            try:
                chosen |= {name} if name in classes else set(_expanded(str(name)))
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from error
    return tuple(name for name in dict.fromkeys((*NAMES, *classes)) if name in chosen)


def _all_annotated(
    content: Mapping[str, Any],
    cases: Mapping[str, Mapping[str, Any]],
    classes: tuple[str, ...],
    where: str,
) -> tuple[str, ...]:
    """What the dataset annotates, or without a word on that, what its cases together do."""
    own = {
        case: _annotated(given["annotated"], classes, f"{where}: annotated of {case}")
        for case, given in cases.items()
        if given.get("annotated") is not None
    }
    given = content.get("annotated")
    if given is None and content.get("vocabulary"):
        # A vocabulary knows more names than a dataset labels: silence must not mean all of them.
        if content.get("layout") != "cases" or len(own) < len(cases):
            raise UsageError(f"{where}: a vocabulary needs annotated, for all or for each case.")
        given = sorted({name for names in own.values() for name in names})
    return _annotated(given, classes, f"{where}: annotated")


def _cases(content: Mapping[str, Any], where: str) -> list[tuple[Any, Any]]:
    return list(_mapping(content.get("cases") or {}, f"{where}: cases").items())


def _weight(given: Any, where: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < 1e6:
        raise UsageError(f"{where}: weight is {given!r}; give a number from 0 on.")
    return float(given)


def _mapping(given: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(given, Mapping):
        raise UsageError(f"{where}: expected entries 'key: value', not {type(given).__name__}.")
    return given


def _only(given: Mapping[Any, Any], allowed: tuple[str, ...], where: str) -> None:
    wrong = [str(key) for key in given if key not in allowed]
    if wrong:
        raise UsageError(f"{where}: unknown {listed(wrong)}; allowed are {', '.join(allowed)}.")
