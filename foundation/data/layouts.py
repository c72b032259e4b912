"""How the cases of a dataset are found: patterns of file names, or a `dataset.json`."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from foundation.data.cases import natural_key, safe_id
from foundation.errors import UsageError, listed
from foundation.files import nifti_stem


@dataclass(frozen=True)
class Found:
    """Files that belong together. split: "train", "val", "test" where the publisher says so."""

    id: str
    image: Path | None
    labels: tuple[Path, ...]
    split: str | None = None
    names_file: Path | None = None


@dataclass
class Survey:
    """What a folder holds. faults: (case id, what is wrong), for what had to be left out."""

    found: list[Found] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)

    def sort(self) -> Survey:
        """The same with the cases in natural order of their ids."""
        self.found.sort(key=lambda each: natural_key(each.id))
        self.faults.sort(key=lambda fault: natural_key(fault[0]))
        return self


class Layout(Protocol):
    """A way to find cases in a folder."""

    @property
    def expected(self) -> str:
        """For an error's text: what the folder should hold."""

    def survey(self, root: Path) -> Survey:
        """Find the cases below `root`, complete ones and what is wrong with the others."""


@dataclass(frozen=True)
class Patterns:
    """Images and labels by the patterns of their paths, paired by id.

    In a pattern, {id} is the case (no "/"; digits only as {number}), * and ? stand for parts of a
    name, **/ for any folders; .nii also matches .nii.gz and the other way round. A pattern of
    images that ends in "/" means folders with a DICOM series. Hidden files and those that macOS
    adds ("._…", "__MACOSX") are passed over.

    many: each case has several files of labels. meta: name of a CSV table, anywhere below the
    root, with columns image_id and split. names_file: pattern of the file that names the labels.
    """

    images: tuple[str, ...]
    labels: tuple[str, ...]
    many: bool = False
    meta: str | None = None
    names_file: str | None = None

    @property
    def expected(self) -> str:
        """For an error's text: what the folder should hold."""
        return " with ".join(" or ".join(group) for group in (self.images, self.labels) if group)

    def survey(self, root: Path) -> Survey:
        """Pair images and labels below `root`."""
        entries = list(_walk(root))
        images = _matches(entries, self.images, root)
        labels = _matches(entries, self.labels, root)
        names = _matches(entries, (self.names_file,), root) if self.names_file else {}
        splits = self._splits(root, entries)
        survey = Survey()
        for id_ in {**images, **labels}:
            image, label = images.get(id_, []), labels.get(id_, [])
            name = names.get(id_, [])
            if fault := self._fault(image, label, name):
                survey.faults.append((safe_id(id_), fault))
                continue
            survey.found.append(
                Found(
                    safe_id(id_),
                    image[0] if image else None,
                    (*label, *name),
                    splits.get(id_),
                    name[0] if name else None,
                )
            )
        return _without_duplicates(survey).sort()

    def _fault(self, images: list[Path], labels: list[Path], names: list[Path]) -> str:
        if len(images) > 1:
            return f"duplicate id: its image is {_paths(images)}. Keep one."
        if self.images and not images:
            return f"no image for the label {labels[0]}."
        if not labels:
            return f"no label for the image {images[0]}."
        if len(labels) > 1 and not self.many:
            return f"duplicate id: its label is {_paths(labels)}. Keep one."
        if self.names_file and len(names) != 1:
            return f"no file that names its labels ({self.names_file})."
        return ""

    def _splits(self, root: Path, entries: Sequence[str]) -> dict[str, str]:
        tables = [path for path in entries if path.rpartition("/")[2] == self.meta]
        return read_splits(root / tables[0]) if tables else {}


@dataclass(frozen=True)
class DatasetJson:
    """Cases listed in a `dataset.json`: the Medical Segmentation Decathlon's, AMOS's, nnU-Net's.

    folder: the folder's name begins so, where several tasks lie side by side. lists: the entries
    to read. Without lists, as in nnU-Net's own format, `imagesTr/<id>_0000` belongs to
    `labelsTr/<id>`.
    """

    folder: str = ""
    lists: tuple[str, ...] = ("training",)

    @property
    def expected(self) -> str:
        """For an error's text: what the folder should hold."""
        where = f"{self.folder}…/" if self.folder else ""
        return f"{where}dataset.json with {where}imagesTr and labelsTr"

    def survey(self, root: Path) -> Survey:
        """Read the index and look for each file that it names."""
        index = self._find_index(root)
        content = read_dataset_json(index)
        base, survey = index.parent, Survey()
        entries = [entry for name in self.lists for entry in content.get(name) or []]
        pairs = [(e["image"], e["label"]) for e in entries if isinstance(e, dict) and "label" in e]
        if not pairs:
            images = ("imagesTr/{id}_0000.nii.gz",)
            return Patterns(images, ("labelsTr/{id}.nii.gz",)).survey(base)
        for image, label in pairs:
            id_ = safe_id(nifti_stem(Path(image)) or Path(image).name)
            files = [_packed_or_not(base / image), _packed_or_not(base / label)]
            lost = [str(path) for path in files if not path.is_file()]
            if lost:
                what = "image" if lost[0] == str(files[0]) else "label"
                fault = f"no {what}: {listed(lost)}, named in {index}, does not exist."
                survey.faults.append((id_, fault))
            else:
                survey.found.append(Found(id_, files[0], (files[1],)))
        return _without_duplicates(survey).sort()

    def _find_index(self, root: Path) -> Path:
        every = [root / path for path in _walk(root)]
        every = [path for path in every if path.name == "dataset.json"]
        named = [path for path in every if self.folder and path.parent.name.startswith(self.folder)]
        chosen = named or every
        if len(chosen) == 1:
            return chosen[0]
        problem = f"{len(chosen)} of them: {_paths(chosen)}" if chosen else "none"
        raise UsageError(f"Expected {self.expected} in {root}; found {problem}.")


def read_splits(table: Path) -> dict[str, str]:
    """Case → split from a CSV table with the columns image_id and split, as TotalSegmentator's."""
    text = table.read_text(encoding="utf-8-sig")
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    rows = csv.DictReader(text.splitlines(), delimiter=delimiter)
    return {
        row["image_id"]: row["split"] for row in rows if row.get("image_id") and row.get("split")
    }


def read_dataset_json(path: Path) -> dict[str, Any]:
    """The content of a `dataset.json`.

    Raises:
        UsageError: it is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object; is it a dataset's index?")
    return content


def check_pattern(pattern: str) -> None:
    """Raise UsageError for a pattern without {id}, or that leaves the folder."""
    if "{id}" not in pattern and "{number}" not in pattern:
        raise UsageError(f"The pattern {pattern!r} has no {{id}}: it cannot tell cases apart.")
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise UsageError(f"The pattern {pattern!r} leaves the folder; give it relative to it.")


def _walk(root: Path) -> Iterator[str]:
    """Every file below `root`, and with "/" at its end every folder that holds files."""
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder. Give the folder that holds the dataset.")
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        below = Path(folder).relative_to(root).as_posix()
        prefix = "" if below == "." else f"{below}/"
        visible = sorted(name for name in files if not name.startswith("."))
        if visible and prefix:
            yield prefix
        for name in visible:
            yield prefix + name


def _matches(entries: Sequence[str], patterns: Sequence[str], root: Path) -> dict[str, list[Path]]:
    """Paths by case id."""
    found: dict[str, list[Path]] = {}
    for pattern in patterns:
        expression = re.compile(_expression(pattern))
        for path in entries:
            if match := expression.fullmatch(path):
                found.setdefault(match["id"], []).append(root / path)
    for paths in found.values():
        paths.sort(key=lambda path: natural_key(str(path)))
    return found


def _expression(pattern: str) -> str:
    """A pattern as a regular expression with a group "id"."""
    pattern = re.sub(r"\.nii(\.gz)?$", "", pattern) + (
        "<nifti>" if re.search(r"\.nii(\.gz)?$", pattern) else ""
    )
    parts, seen = [], False
    for part in re.split(r"(\*\*/|\*|\?|\{id\}|\{number\}|<nifti>)", pattern):
        if part in ("{id}", "{number}"):
            digits = r"\d+" if part == "{number}" else "[^/]+"
            parts.append("(?P=id)" if seen else f"(?P<id>{digits})")
            seen = True
        else:
            fixed = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]", "<nifti>": r"\.nii(?:\.gz)?"}
            parts.append(fixed.get(part, re.escape(part)))
    return "".join(parts)


def _packed_or_not(path: Path) -> Path:
    """The path, or the same file with or without .gz where only that exists."""
    other = path.with_suffix("") if path.suffix == ".gz" else path.with_name(path.name + ".gz")
    return other if not path.is_file() and other.is_file() else path


def _without_duplicates(survey: Survey) -> Survey:
    """The survey without cases whose ids are the same, which become a fault."""
    groups: dict[str, list[Found]] = {}
    for each in survey.found:
        groups.setdefault(each.id, []).append(each)
    survey.found = [group[0] for group in groups.values() if len(group) == 1]
    for id_, group in groups.items():
        if len(group) > 1:
            paths = _paths([each.image or each.labels[0] for each in group])
            survey.faults.append((id_, f"duplicate id: {paths}. Keep one."))
    return survey


def _paths(paths: Sequence[Path]) -> str:
    return listed([str(path) for path in paths], 3)
