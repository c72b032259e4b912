"""Masks and label maps as anyone has them: which cases lie at a path, and what their labels are.

a file         a label map (.nii, .nii.gz)
a folder       our result (segmentation.json); one mask a class (liver.nii.gz, …), in it or in
               segmentations/; labels.nii.gz with labels.json; or many cases, each a file or a
               folder of one of these kinds, as TotalSegmentator and nnU-Net write them

The names of a label map's values come from the table that is given, else from our sidecar, the
extension in the file's header (as TotalSegmentator writes it), `labels.json` or nnU-Net's
`dataset.json` in its folder, or `dataset.json` in the folder above.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from foundation.data import nnunet
from foundation.data.cases import Scan, natural_key
from foundation.data.layouts import IMAGES, INDEX, MAPS, MASK_FOLDERS
from foundation.data.meaning import PARENTS
from foundation.data.naming import known_classes, parts_of
from foundation.data.reading import (
    count_values,
    overlay,
    read_label_map,
    read_names,
    turned_to,
)
from foundation.data.reference import Reference
from foundation.errors import UsageError, VolumeError, listed
from foundation.files import nifti_stem
from foundation.imaging.geometry import grid_difference
from foundation.imaging.hidden import read_hidden
from foundation.imaging.layout import ResultFiles
from foundation.imaging.sidecar import Sidecar, find_sidecar
from foundation.settings import read_file
from foundation.taxonomy import NAMES, PAIRED, TOTALSEGMENTATOR, in_order, normalise

NAMES_FILE = "labels.json"
_SIDECAR_END = ".segmentation.json"
Values = Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class Labelled:
    """The labels of one case, found but not read.

    Attributes:
        case: Its name.
        label_map: NIfTI file with a value a voxel, or None.
        values: Value of the label map → its labels; several where labels are regions of values.
        masks: Label → NIfTI file of its own, whose voxels that are not 0 count.
        ignored: Values of the label map whose voxels may be anything.
        hidden: File with voxels that the label map shows as others, or None.
    """

    case: str
    label_map: Path | None = None
    values: Values = field(default_factory=dict)
    masks: Mapping[str, Path] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    hidden: Path | None = None

    @property
    def path(self) -> Path:
        """One of its files, for messages."""
        return self.label_map or next(iter(self.masks.values()))

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that is named, whether a voxel has it or not."""
        named = [label for labels in self.values.values() for label in labels]
        return tuple(dict.fromkeys([*named, *self.masks]))

    @cached_property
    def meaning(self) -> dict[str, tuple[str, ...]]:
        """Label → classes; both sides of a pair that it merges."""
        return meaning_of(self.labels)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Every class that is labelled; a pair whose sides a label merges stands for both."""
        merged = {pair for pair, both in PAIRED.items() if both in self.meaning.values()}
        sides = {side for pair in merged for side in PAIRED[pair]}
        every = {name for names in self.meaning.values() for name in names}
        return tuple(in_order((every - sides) | merged))

    @property
    def wholes(self) -> dict[str, str]:
        """A class that is a part of another, such as a lobe → the other."""
        return {names[0]: names[1] for names in self.meaning.values() if _is_part(names)}

    def read(self, classes: Collection[str], like: Reference | None = None) -> Reference:
        """Read the labels.

        Args:
            classes: Of these classes, or of pairs; masks of others are not read.
            like: On whose grid they must be; any if not given.

        Returns:
            The labels, in the order of the voxels of `like`.

        Raises:
            VolumeError: A file cannot be read, holds a value without a name, or is on another grid.
        """
        labels = [label for label in self.labels if self._serves(label, classes)]
        scan = self._scan(labels, like)
        meaning = {label: self.meaning[label] for label in labels}
        annotated = in_order({name for names in meaning.values() for name in names})
        return Reference.of(scan, meaning, annotated, self.ignored)

    def _serves(self, label: str, classes: Collection[str]) -> bool:
        """Whether the label is of one of the classes, or of a lesion in one."""
        for name in self.meaning[label]:
            organ = PARENTS.get(name)
            around = {name, name.rpartition("_")[0], organ, f"{organ}_right", f"{organ}_left"}
            if not around.isdisjoint(classes):
                return True
        return False

    def _scan(self, labels: list[str], like: Reference | None) -> Scan:
        grid = None if like is None else (like.affine, like.labels.shape)
        if not self.masks and self.hidden is None:
            assert self.label_map is not None
            values, affine = _on_grid(self.label_map, grid)
            return Scan(None, affine, values, self._names(values))
        wanted = [self.masks[label] for label in labels if label in self.masks]
        _, affine = first = _on_grid(wanted[0] if wanted else self.path, grid)
        grid = (affine, first[0].shape)
        hidden = {} if self.hidden is None else read_hidden(self.hidden)
        if nameless := [str(value) for value in hidden if value not in self.values]:
            raise VolumeError(f"{self.hidden} has the value {nameless[0]}, which nothing names.")

        def each() -> Iterator[tuple[str, NDArray[np.bool_]]]:
            if self.label_map is not None:
                # On its own axes, which are those of the hidden voxels.
                values, own = read_label_map(self.label_map)
                names = dict(enumerate(self._names(values)))
                names |= {value: self.values[value] for value in hidden}
                for value in names:
                    for name in names[value]:
                        if name in labels and name not in self.masks:
                            mask = values == value
                            if value in hidden:
                                hidden[value].add_to(mask)
                            yield name, _turned(self.label_map, mask, own, grid)
            for label in labels:
                if label in self.masks:
                    yield label, _on_grid(self.masks[label], grid)[0] > 0

        return Scan(None, affine, *overlay(grid[1], each()))

    def _names(self, values: NDArray[Any]) -> tuple[tuple[str, ...], ...]:
        """The labels of each value that occurs."""
        counts = count_values(values, int(values.max()) + 1)
        used = [int(value) for value in np.flatnonzero(counts) if value]
        ignored = {int(value) for value in self.ignored}
        if nameless := [str(v) for v in used if v not in self.values and v not in ignored]:
            raise VolumeError(
                f"{self.label_map} has label {listed(nameless)}, which nothing names; named are "
                f"{listed(sorted(map(str, self.values)), 20)}. Give the names of all its values."
            )
        return tuple(
            self.values.get(value, (str(value),)) if value in used else ()
            for value in range(len(counts))
        )


def meaning_of(labels: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Find out which classes labels stand for.

    A label that is one of several parts of a class, as a lobe is of a lung, is a class of its own;
    it belongs to the whole too where all parts are labelled.

    Args:
        labels: As their source spells them.

    Returns:
        Label → its classes. A label that is none of the 32 classes is a class of its own, whose
        name is the label in lower case, with the side at its end.
    """
    there = set(labels)
    found = {}
    for label in labels:
        own = own_name(label)
        known = known_classes(label, NAMES)
        named = known and TOTALSEGMENTATOR.get(label, label) != label
        # A lesion of one side is the whole of what there is: only organs have parts.
        parts = parts_of(known[0]) if named and known[0] not in PARENTS else ()
        if len(parts) > 1:
            found[label] = (own, *known) if set(parts) <= there else (own,)
        else:
            found[label] = known or (own,)
    return found


def _is_part(names: tuple[str, ...]) -> bool:
    return len(names) > 1 and names not in PAIRED.values()


def own_name(label: str) -> str:
    """Return the name of a class that is none of the 32, in whatever spelling it is given."""
    return normalise(label).replace(" ", "_")


def find_labelled(path: Path, names: Path | None = None) -> dict[str, Labelled]:
    """Find the labelled cases at a path.

    Args:
        path: A file or a folder, see the module's text.
        names: A YAML or JSON file with the names of label maps' values.

    Returns:
        Name of the case → its labels, in natural order.

    Raises:
        UsageError: Nothing is there, or nothing names the values of a label map.
    """
    given = _read_table(names) if names else None
    if path.is_file():
        return {each.case: each for each in [_of_map(path, given)]}
    if not path.is_dir():
        raise UsageError(f"{path} does not exist. Check the path.")
    one = _one_case(path, given)
    if one is not None:
        return {one.case: one}
    found: dict[str, Labelled] = {}
    for sidecar in sorted(path.glob(f"*{_SIDECAR_END}")):
        each = _of_result(sidecar, sidecar.name.removesuffix(_SIDECAR_END))
        found[each.case] = each
    for file in _niftis(path):
        if str(nifti_stem(file)) not in found:
            found[str(nifti_stem(file))] = _of_map(file, given)
    for folder in sorted(each for each in path.iterdir() if each.is_dir()):
        inside = None if folder.name.startswith(".") else _one_case(folder, given, alone=True)
        if inside is not None:
            found.setdefault(folder.name, inside)
    if not found:
        raise UsageError(
            f"{path} holds no masks: no .nii or .nii.gz file, in it or in a folder for each case."
        )
    return {name: found[name] for name in sorted(found, key=natural_key)}


def _one_case(folder: Path, given: Values | None, alone: bool = False) -> Labelled | None:
    """The case that a folder is; None where it holds several, or none.

    alone: its only file is the case's label map, whatever its name.
    """
    places = ResultFiles.inside(folder)
    if find_sidecar(places.sidecar) is not None:
        return _of_result(places.sidecar, folder.name)
    inner = [file for name in MASK_FOLDERS for file in _niftis(folder / name)]
    if inner:
        return Labelled(folder.name, masks={str(nifti_stem(file)): file for file in inner})
    files = [file for file in _niftis(folder) if str(nifti_stem(file)).lower() not in IMAGES]
    maps = [file for file in files if str(nifti_stem(file)).lower() in MAPS]
    if len(maps) == 1:
        return _of_map(maps[0], given, folder.name)
    named = given or any((folder / name).is_file() for name in (NAMES_FILE, INDEX))
    if files and not named and not _names_in_header(files[0]):
        stems = {str(nifti_stem(file)): file for file in files}
        if any(known_classes(stem, NAMES) or stem in TOTALSEGMENTATOR for stem in stems):
            return Labelled(folder.name, masks=stems)
    if alone and len(files) == 1:
        return _of_map(files[0], given, folder.name)
    return None


def _of_map(path: Path, given: Values | None, case: str | None = None) -> Labelled:
    stem = nifti_stem(path)
    if stem is None:
        raise UsageError(f"{path} is not a NIfTI file (.nii, .nii.gz).")
    case = case or stem
    if given is not None:
        return Labelled(case, path, given)
    sidecar = ResultFiles.of(path).sidecar
    if find_sidecar(sidecar) is not None:
        return _of_result(sidecar, case)
    inside = find_sidecar(path.parent / "segmentation.json")
    if inside is not None and inside.label_map == path.name:
        return _of_result(path.parent / "segmentation.json", path.parent.name)
    if in_header := _names_in_header(path):
        return Labelled(case, path, in_header)
    if (path.parent / NAMES_FILE).is_file():
        named = read_names(path.parent / NAMES_FILE)
        return Labelled(case, path, {v: (n,) for v, n in named.items() if v})
    for index in (path.parent / INDEX, path.parent.parent / INDEX):
        if index.is_file():
            labels = nnunet.read_labels(index)
            values: dict[int, tuple[str, ...]] = {}
            for name, numbers in labels.values.items():
                for number in numbers:
                    values[number] = (*values.get(number, ()), name)
            return Labelled(case, path, values, ignored=labels.ignored)
    raise UsageError(
        f"Nothing names the values of {path}. Give --names with a YAML file such as {{1: liver}}, "
        f"or put {NAMES_FILE} or nnU-Net's {INDEX} beside it."
    )


def _of_result(path: Path, case: str) -> Labelled:
    """A result of ours: what the label map does not show whole, other files have."""
    sidecar = Sidecar.read(path)
    if not sidecar.complete:
        raise UsageError(f"{path} is of a result that was not finished. Segment the CT again.")
    label_map = path.parent / sidecar.label_map if sidecar.label_map else None
    own = {label.name: path.parent / label.file for label in sidecar.labels.values() if label.file}
    values = {int(value): (label.name,) for value, label in sidecar.labels.items()}
    hidden = path.parent / sidecar.hidden if sidecar.hidden else None
    return Labelled(case, label_map, values if label_map else {}, own, hidden=hidden)


def _on_grid(
    path: Path, grid: tuple[NDArray[np.float64], tuple[int, ...]] | None
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    labels, affine = read_label_map(path)
    return (labels, affine) if grid is None else (_turned(path, labels, affine, grid), grid[0])


def _turned(
    path: Path,
    labels: NDArray[Any],
    affine: NDArray[np.float64],
    grid: tuple[NDArray[np.float64], tuple[int, ...]],
) -> NDArray[Any]:
    turned = turned_to(labels, affine, *grid)
    if turned is None:
        raise VolumeError(
            f"{path} is on another grid than what it is compared with: "
            f"{grid_difference(affine, labels.shape, *grid)}. Nothing is resampled here, since "
            "that changes the result: give masks on the grid of the reference."
        )
    return turned


def _names_in_header(path: Path) -> Values:
    """The names in a NIfTI header's extension: XML with a Label for each value."""
    try:
        extensions = getattr(nib.load(path).header, "extensions", [])
    except Exception:  # a broken file is reported when it is read
        return {}
    for extension in extensions:
        content = extension.get_content()
        text = content if isinstance(content, bytes) else str(content).encode()
        try:
            root = ElementTree.fromstring(text.strip(b"\x00 \r\n\t"))
            found = {
                int(each.attrib["Key"]): (each.text or "").strip() for each in root.iter("Label")
            }
        except (ElementTree.ParseError, KeyError, ValueError):
            continue
        if named := {value: (name,) for value, name in found.items() if value and name}:
            return named
    return {}


def _read_table(path: Path) -> Values:
    """Value → name, or name → value as nnU-Net has it."""
    content = read_file(path)
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{path} holds no names of labels: write {{1: liver, 2: spleen}}.")
    if "labels" in content and isinstance(content["labels"], dict):
        content = content["labels"]
    found: dict[int, tuple[str, ...]] = {}
    for key, other in content.items():
        value, name = (key, other) if str(key).isdigit() else (other, key)
        if not str(value).isdigit() or not isinstance(name, str):
            raise UsageError(
                f"{path}: {key!r}: {other!r} is no value with its name, as 1: liver is."
            )
        if int(value):
            found[int(value)] = (*found.get(int(value), ()), name)
    return found


def _niftis(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = (each for each in folder.iterdir() if each.is_file())
    return sorted(each for each in files if nifti_stem(each) and not each.name.startswith("."))
