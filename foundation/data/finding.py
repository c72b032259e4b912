"""Scans with labels as people have them: which layout a path has, and how its cases are read.

folders   a folder per case: ct.nii.gz with labels.nii.gz and labels.json ({"1": "liver"}), or with
          one mask per structure beside it or in segmentations/; TotalSegmentator's tree is one,
          whose meta.csv gives the splits
nnunet    nnU-Net's dataset.json, imagesTr, labelsTr; imagesTs with labelsTs is for testing
table     a CSV table with the columns image, label, class; value and split where needed
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from foundation.data.cases import Case, safe_id
from foundation.data.dataset import Adapter
from foundation.data.layouts import Found, read_dataset_json
from foundation.data.naming import Naming
from foundation.data.own import (
    LAYOUTS,
    MAPS,
    CaseFolders,
    Fixed,
    NnUNet,
    OwnAdapter,
    Row,
    TableAdapter,
)
from foundation.data.reading import read_names, structures_of
from foundation.errors import UsageError, listed
from foundation.files import nifti_stem
from foundation.taxonomy import Dataset


@dataclass(frozen=True)
class Source:
    """Scans found at a path. adapters: how they are read. labels: every name that files give.

    images: case key → its scan. splits: case key → "train", "val", "test" where a publisher says.
    """

    layout: str
    root: Path
    adapters: tuple[Adapter, ...]
    labels: frozenset[str]
    images: Mapping[str, Path]
    splits: Mapping[str, str]


@dataclass(frozen=True)
class Settle:
    """Says of each case what it annotates; leaves out what has no class, or is not wanted.

    fixed: source labels of every case; None: each case has its own. only: training cases to use.
    """

    naming: Naming
    fixed: tuple[str, ...] | None = None
    only: frozenset[str] | None = None
    rows: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)

    def __call__(self, case: Case, _: Dataset) -> Case | str:
        """As `Adapter.settle`."""
        if self.only is not None and case.split in (None, "train") and case.id not in self.only:
            return "not among the chosen training scans."
        annotated = self.naming.annotated(self.labels(case))
        if not annotated:
            return "none of its labels is of a class to learn or of a known one."
        labels = case.labels
        if self._is_masks(case):
            labels = tuple(
                path for path in labels if any(map(self.naming.classes, structures_of([path])))
            )
        return replace(case, annotated=annotated, labels=labels)

    def labels(self, case: Case) -> tuple[str, ...]:
        """The names of source labels that say something about this case."""
        if self.fixed is not None:
            return self.fixed
        if case.id in self.rows:
            return tuple(row.name for row in self.rows[case.id])
        if case.names_file:
            return tuple(read_names(case.names_file).values())
        if self._is_masks(case):
            return tuple(sorted(structures_of(case.labels)))
        numbers = [label for each in self.naming.new for label in each.labels if label.isdigit()]
        return tuple(numbers)  # a map without names: its values

    def _is_masks(self, case: Case) -> bool:
        first = str(nifti_stem(case.labels[0])).lower()
        return not self.rows and self.fixed is None and first not in MAPS


def find_source(
    path: Path, naming: Naming, prefix: str = "", only: frozenset[str] | None = None
) -> Source:
    """Find out which layout a path has, and what its labels are called.

    prefix: of the names of its datasets in the store. only: names of the training scans to use.

    Raises:
        UsageError: nothing of a known layout lies there, or a table or index is wrong.
    """
    if path.is_file() and path.suffix.lower() == ".csv":
        layout, root, adapters = "a CSV table", *_table(path, naming, prefix, only)
    elif not path.is_dir():
        raise UsageError(f"{path} is neither a folder nor a CSV table. Give {LAYOUTS}.")
    elif (path / "dataset.json").is_file():
        layout, root, adapters = "nnU-Net's format", path, (_nnunet(path, naming, prefix, only),)
    else:
        trees = (path / "meta.csv").is_file()
        layout = "TotalSegmentator's tree" if trees else "a folder per case"
        root, adapters = path, _folders(path, naming, prefix, only)
    labels: set[str] = set()
    images, splits = {}, {}
    for adapter in adapters:
        assert isinstance(adapter.settle, Settle)
        for each in adapter.layout.survey(root).found:
            key = f"{adapter.dataset.id}/{each.id}"
            case = Case(adapter.dataset.id, each.id, each.image, each.labels, ())
            labels |= {*adapter.settle.labels(replace(case, names_file=each.names_file))}
            assert each.image is not None
            images[key] = each.image
            if each.split:
                splits[key] = each.split
    if only is not None and (lost := sorted(only - {key.split("/", 1)[1] for key in images})):
        raise UsageError(f"{path} has no scan {listed(lost)}, which were chosen for training.")
    return Source(layout, root, tuple(adapters), frozenset(labels), images, splits)


def _adapter(
    name: str, labels_as: str, layout: Any, settle: Settle, keys: Mapping[int | str, str]
) -> OwnAdapter:
    """keys: source label as it is read → its name."""
    label_map = {key: settle.naming.classes(label) for key, label in keys.items()}
    label_map = {key: classes for key, classes in label_map.items() if classes}
    annotated = tuple(dict.fromkeys(each for names in label_map.values() for each in names))
    return OwnAdapter(
        Dataset(name, name, label_map, annotated),
        layout,
        labels_as=labels_as,
        settle=settle,
        open_names=True,
    )


def _folders(
    root: Path, naming: Naming, prefix: str, only: frozenset[str] | None
) -> tuple[Adapter, ...]:
    adapters = []
    settle = Settle(naming, only=only)
    kinds: tuple[tuple[Literal["label map", "masks"], str], ...] = (
        ("label map", "maps"),
        ("masks", "masks"),
    )
    faults: list[str] = []
    for labels_as, name in kinds:
        layout = CaseFolders(labels_as)
        survey = layout.survey(root)
        faults += [fault for _, fault in survey.faults]
        names: set[str] = set()
        for each in survey.found:
            case = Case("", each.id, each.image, each.labels, (), names_file=each.names_file)
            names |= {*settle.labels(case)}
        if survey.found:
            keys: dict[int | str, str] = {label: label for label in sorted(names)}
            adapters.append(_adapter(prefix + name, labels_as, layout, settle, keys))
    if not adapters:
        why = f" What was found: {listed(faults, 2)}" if faults else ""
        raise UsageError(f"No labelled scan in {root}.{why} Give {LAYOUTS}.")
    return tuple(adapters)


def _nnunet(root: Path, naming: Naming, prefix: str, only: frozenset[str] | None) -> Adapter:
    index = root / "dataset.json"
    content = read_dataset_json(index)
    channels = content.get("channel_names") or content.get("modality") or {}
    kind = str(next(iter(channels.values()), "CT")) if isinstance(channels, dict) else "CT"
    if kind.lower().startswith(("mr", "t1", "t2", "flair", "adc", "pet")):
        raise UsageError(f"{index} says that its scans are {kind}; only CT can be used.")
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise UsageError(f"{index} has no labels: it is not nnU-Net's format.")
    if all(isinstance(name, str) for name in labels.values()):  # version 1 says value → name
        labels = {name: value for value, name in labels.items()}
    names: dict[str, list[int]] = {}
    for name, value in labels.items():  # a region has several values
        try:
            names[name] = [int(v) for v in (value if isinstance(value, list) else [value])]
        except (TypeError, ValueError) as error:
            raise UsageError(f"{index}: label {name!r} has the value {value!r}.") from error
    ignored = tuple(str(value) for value in names.pop("ignore", []))
    used = [name for name, values in names.items() if 0 not in values]
    label_map: dict[int | str, tuple[str, ...]] = {}
    for name in used:
        for value in names[name]:
            found = (*label_map.get(value, ()), *naming.classes(name))
            label_map[value] = tuple(dict.fromkeys(found))
    adapter = _adapter(
        f"{prefix}nnunet", "label map", NnUNet(), Settle(naming, tuple(used), only), {}
    )
    label_map = {value: classes for value, classes in label_map.items() if classes}
    return replace(adapter, dataset=replace(adapter.dataset, label_map=label_map), unknown=ignored)


def _table(
    path: Path, naming: Naming, prefix: str, only: frozenset[str] | None
) -> tuple[Path, tuple[Adapter, ...]]:
    by_image: dict[Path, list[tuple[Row, str | None]]] = {}
    for image, row, split in _rows(path):
        by_image.setdefault(image, []).append((row, split))
    ids = _unique_ids(list(by_image))
    found, rows = [], {}
    for image, lines in by_image.items():
        rows[ids[image]] = tuple(row for row, _ in lines)
        files = tuple(dict.fromkeys(row.label for row, _ in lines))
        found.append(Found(ids[image], image, files, next((s for _, s in lines if s), None)))
    every = [path.parent, *by_image, *(row.label for each in rows.values() for row in each)]
    root = Path(os.path.commonpath([each.absolute() for each in every]))
    settle = Settle(naming, only=only, rows=rows)
    keys: dict[int | str, str] = {r.source: r.name for each in rows.values() for r in each}
    adapter = _adapter(f"{prefix}table", "masks", Fixed(tuple(found)), settle, keys)
    fields = {name: getattr(adapter, name) for name in Adapter.__dataclass_fields__}
    return root, (TableAdapter(**fields, rows=rows),)


def _rows(path: Path) -> Iterator[tuple[Path, Row, str | None]]:
    """Image, line and split of each line of a table, files checked."""
    text = path.read_text(encoding="utf-8-sig")
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter)
    columns = [str(name).strip().lower() for name in reader.fieldnames or ()]
    if not {"image", "label", "class"} <= set(columns):
        raise UsageError(
            f"{path} has the columns {listed(columns) or 'none'}; it needs image, label and class, "
            "and may have value and split."
        )
    reader.fieldnames = columns
    lines = 0
    for lines, given in enumerate(reader, start=1):
        where = f"{path}, line {lines + 1}"
        cells = {key: (given.get(key) or "").strip() for key in columns}
        files = [(path.parent / cells[key]).absolute() for key in ("image", "label")]
        for key, file in zip(("image", "label"), files, strict=True):
            if not cells[key] or not file.exists():
                raise UsageError(f"{where}: {key} {cells[key]!r} does not exist beside the table.")
        if not cells["class"]:
            raise UsageError(f"{where}: class is empty; name what the label is of.")
        value = cells.get("value", "")
        if value and not value.isdigit():
            raise UsageError(f"{where}: value is {value!r}; give a whole number, or nothing.")
        row = Row(files[1], cells["class"], int(value) if value else None)
        yield files[0], row, cells.get("split") or None
    if not lines:
        raise UsageError(f"{path} has no line besides its columns.")


def _unique_ids(images: Sequence[Path]) -> dict[Path, str]:
    """A case's name: its file's, with those of folders before it as far as they differ."""
    depth = 1
    while True:
        names = {image: "_".join((*image.parts[-depth:-1], _stem(image))) for image in images}
        names = {image: safe_id(name) for image, name in names.items()}
        if max(Counter(names.values()).values()) == 1 or depth > 20:
            return names
        depth += 1


def _stem(path: Path) -> str:
    return nifti_stem(path) or path.name
