"""How the cases of a dataset are found: by patterns of file names, an index, a folder per case."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from foundation.data.cases import Case, natural_key, safe_id
from foundation.errors import UsageError, listed
from foundation.files import nifti_stem
from foundation.settings import read_file

INDEX = "dataset.json"
# The names of files in a folder per case, and of the folders with a mask per structure.
IMAGES, MAPS = ("ct", "image", "imaging"), ("labels", "label", "segmentation")
MASK_FOLDERS = ("segmentations", "masks")


@dataclass
class Survey:
    """What a folder holds.

    Attributes:
        found: The cases that are whole.
        faults: (case id, what is wrong), for what had to be left out.
    """

    found: list[Case] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)

    def sort(self) -> Survey:
        """Sort cases and faults in natural order of the ids, in place.

        Returns:
            The survey itself.
        """
        self.found.sort(key=lambda each: natural_key(each.id))
        self.faults.sort(key=lambda fault: natural_key(fault[0]))
        return self


class Layout(Protocol):
    """A way to find cases in a folder."""

    @property
    def expected(self) -> str:
        """For an error's text: what the folder should hold."""

    def survey(self, root: Path) -> Survey:
        """Find the cases below a folder: whole ones, and what is wrong with the others.

        Args:
            root: The folder that holds the dataset.

        Returns:
            The cases in natural order of their ids, and the faults.

        Raises:
            UsageError: `root` is no folder, or lacks what the layout cannot do without.
        """


@dataclass(frozen=True)
class Patterns:
    """Images and labels by the patterns of their paths, paired by id.

    In a pattern, {id} is the case (no "/"; digits only as {number}), * and ? stand for parts of a
    name, **/ for any folders; .nii also matches .nii.gz and the other way round. A pattern of
    images that ends in "/" means folders with a DICOM series. Hidden files and those that macOS
    adds ("._…", "__MACOSX") are passed over.

    Attributes:
        images, labels: Patterns.
        many: Each case has several files of labels.
        splits: Name of a CSV table, anywhere below the root, with columns image_id and split.
        names_file: Pattern of the file that names the labels.
    """

    images: tuple[str, ...]
    labels: tuple[str, ...]
    many: bool = False
    splits: str | None = None
    names_file: str | None = None

    @property
    def expected(self) -> str:
        """For an error's text: what the folder should hold."""
        return " with ".join(" or ".join(group) for group in (self.images, self.labels) if group)

    def survey(self, root: Path) -> Survey:
        """Pair images and labels below a folder.

        Args:
            root: The folder that holds the dataset.

        Returns:
            The cases in natural order of their ids, and the faults.
        """
        entries = list(_walk(root))
        images = _matches(entries, self.images, root)
        labels = _matches(entries, self.labels, root)
        names = _matches(entries, (self.names_file,), root) if self.names_file else {}
        tables = [p for p in entries if self.splits and p.rpartition("/")[2] == self.splits]
        splits = read_splits(root / tables[0]) if tables else {}
        survey = Survey()
        for id_ in {**images, **labels}:
            image, label, name = (found.get(id_, []) for found in (images, labels, names))
            if fault := self._fault(image, label, name):
                survey.faults.append((safe_id(id_), fault))
                continue
            survey.found.append(
                Case(
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


@dataclass(frozen=True)
class DatasetJson:
    """Cases listed in a `dataset.json`: the Medical Segmentation Decathlon's, AMOS's, nnU-Net's.

    Attributes:
        folder: Its name begins so, where several tasks lie side by side.
        lists: The entries to read. Without them, as in nnU-Net's own format,
            `imagesTr/<id>_0000` belongs to `labelsTr/<id>`.
        tests: Also find labelled scans for testing, `imagesTs/<id>_0000` and `labelsTs/<id>`. A
            name that is in both counts once, for training.
    """

    folder: str = ""
    lists: tuple[str, ...] = ("training",)
    tests: bool = False

    @property
    def expected(self) -> str:
        """For an error's text: what the folder should hold."""
        where = f"{self.folder}…/" if self.folder else ""
        return f"{where}dataset.json with {where}imagesTr and labelsTr"

    def survey(self, root: Path) -> Survey:
        """Read the index and look for each file that it names.

        Args:
            root: The folder that holds the dataset.

        Returns:
            The cases in natural order of their ids, and the faults.
        """
        survey = self._training(root)
        if self.tests:
            known = {each.id for each in survey.found}
            tests = Patterns(("imagesTs/{id}_0000.nii.gz",), ("labelsTs/{id}.nii.gz",)).survey(root)
            survey.found += [replace(c, split="test") for c in tests.found if c.id not in known]
        return survey.sort()

    def _training(self, root: Path) -> Survey:
        index = self._find_index(root)
        content = read_dataset_json(index)
        base, survey = index.parent, Survey()
        lists = [content.get(name) for name in self.lists]
        entries = [each for found in lists if isinstance(found, list) for each in found]
        pairs = [
            (str(each["image"]), str(each["label"]))
            for each in entries
            if isinstance(each, dict) and {"image", "label"} <= each.keys()
        ]
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
                survey.found.append(Case(id_, files[0], (files[1],)))
        return _without_duplicates(survey)

    def _find_index(self, root: Path) -> Path:
        every = [root / path for path in _walk(root)]
        every = [path for path in every if path.name == INDEX]
        named = [path for path in every if self.folder and path.parent.name.startswith(self.folder)]
        chosen = named or every
        if len(chosen) == 1:
            return chosen[0]
        problem = f"{len(chosen)} of them: {_paths(chosen)}" if chosen else "none"
        raise UsageError(f"Expected {self.expected} in {root}; found {problem}.")


@dataclass(frozen=True)
class ListedCase:
    """The paths of one case below the root, in which {id} stands for its name.

    Attributes:
        image: Of its scan; None where it has none.
        labels: Of its label map; None where it has none.
        names_file: Of the names of its labels; None where it has none.
    """

    image: str | None
    labels: str | None
    names_file: str | None


@dataclass(frozen=True)
class Listed:
    """Cases that are given one by one.

    Attributes:
        cases: Name → paths.
        expected: For an error's text: what the folder should hold.
    """

    cases: Mapping[str, ListedCase]
    expected: str = field(default="the files of its cases", init=False)

    def survey(self, root: Path) -> Survey:
        """Look for the files of each case; a case without any is not there, which is no fault.

        Args:
            root: The folder that holds the dataset.

        Returns:
            The cases in natural order of their ids, and the faults.
        """
        survey = Survey()
        for name, given in self.cases.items():
            image, labels, names = (
                root / pattern.replace("{id}", name) if pattern else None
                for pattern in (given.image, given.labels, given.names_file)
            )
            names = names if labels else None
            wanted = [path for path in (image, labels, names) if path]
            lost = [str(path) for path in wanted if not path.exists()]
            if lost and len(lost) < len(wanted):
                survey.faults.append((safe_id(name), f"does not exist: {listed(lost)}."))
            elif wanted and not lost:
                files = tuple(path for path in (labels, names) if path)
                survey.found.append(Case(safe_id(name), image, files, None, names))
        return survey.sort()


@dataclass(frozen=True)
class CaseFolders:
    """Every folder below the root with a scan in it is a case.

    A case has a label map beside its scan, which labels.json names (there, or once for all cases
    in the root), or a mask per structure beside the scan or in segmentations/. The splits are
    those of a meta.csv in the root.

    Attributes:
        labels_as: Which kind of cases is found, "label map" or "masks".
        expected: For an error's text: what the folder should hold.
    """

    labels_as: Literal["label map", "masks"]
    expected: str = field(default="a folder per case, with a scan and labels", init=False)

    def survey(self, root: Path) -> Survey:
        """Find the cases whose labels are of this kind.

        A scan without labels is a fault of the label maps.

        Args:
            root: The folder that holds the dataset.

        Returns:
            The cases in natural order of their ids, and the faults.
        """
        survey = Survey()
        splits = read_splits(root / "meta.csv") if (root / "meta.csv").is_file() else {}
        for folder, image in _scans(root):
            id_ = safe_id("_".join(folder.relative_to(root).parts) or root.name)
            here = [path for path in _niftis(folder) if path != image]
            maps = [path for path in here if str(nifti_stem(path)).lower() in MAPS]
            inner = [path for name in MASK_FOLDERS for path in _niftis(folder / name)]
            kind = "masks" if not maps and (here or inner) else "label map"
            if kind != self.labels_as:
                continue
            if not maps and not here and not inner:
                survey.faults.append((id_, f"no labels for the image {image}."))
                continue
            split = splits.get(folder.name)
            if kind == "masks":
                survey.found.append(Case(id_, image, (*here, *inner), split))
                continue
            json = next((p for p in (folder, root) if (p / "labels.json").is_file()), None)
            names = json / "labels.json" if json else None
            files = (maps[0], names) if names else (maps[0],)
            survey.found.append(Case(id_, image, files, split, names))
        return survey.sort()


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read a table with commas or semicolons.

    Args:
        path: A CSV file, whose first line names the columns.

    Returns:
        The names of the columns in lower case; and each line, column → text.

    Raises:
        UsageError: It is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a CSV table: {error}.") from error
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter)
    columns = [str(name).strip().lower() for name in reader.fieldnames or ()]
    reader.fieldnames = columns
    return columns, [{key: (line.get(key) or "").strip() for key in columns} for line in reader]


def read_splits(table: Path) -> dict[str, str]:
    """Read the splits in a CSV table with the columns image_id and split, as TotalSegmentator's.

    Args:
        table: A CSV file.

    Returns:
        Case → split; lines without either are passed over.

    Raises:
        UsageError: The file is no text.
    """
    lines = [line for line in read_csv(table)[1] if line.get("image_id") and line.get("split")]
    return {line["image_id"]: line["split"] for line in lines}


def read_dataset_json(path: Path) -> dict[str, Any]:
    """Read a `dataset.json`.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        UsageError: It is no JSON object.
    """
    content = read_file(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object; is it a dataset's index?")
    return content


def check_pattern(pattern: str) -> None:
    """Refuse a pattern that tells no cases apart, or that leaves the folder.

    Args:
        pattern: Of paths, see `Patterns`.

    Raises:
        UsageError: It has no {id} or {number}, or leaves the folder.
    """
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
    groups: dict[str, list[Case]] = {}
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


def _scans(root: Path) -> Iterator[tuple[Path, Path]]:
    """Every folder with a scan, and the scan; nothing below such a folder is one."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        stems = {str(nifti_stem(Path(name))).lower(): name for name in sorted(files)}
        image = next((stems[name] for name in IMAGES if name in stems), None)
        if image is not None:
            folders.clear()
            yield Path(folder), Path(folder) / image


def _niftis(folder: Path) -> list[Path]:
    """The NIfTI files in a folder, sorted; none where there is no such folder."""
    visible = sorted(folder.glob("[!.]*"))
    return [path for path in visible if path.is_file() and nifti_stem(path) is not None]
