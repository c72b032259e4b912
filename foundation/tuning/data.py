"""A few labelled scans, read, checked, split by case, in a store of their own.

Everything wrong with them is an error here, before a step is trained: of a handful of scans each
one counts, and none is left out in silence.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from foundation.data.cases import DatasetWarning
from foundation.data.finding import Source, find_source
from foundation.data.naming import Naming, NewClass
from foundation.data.store.arrays import Store, StoredCase, read_description
from foundation.data.store.prepare import prepare
from foundation.errors import UsageError, listed
from foundation.files import replacing
from foundation.settings import read, read_file

SPLITS, STORE = "splits.json", "store"
FORMAT_VERSION = 1
_NAMES = ("train", "validation", "test")
_TEST = "test-"  # what names of datasets for testing begin with
_VALIDATION_NAMES = ("val", "validation", "valid")


@dataclass(frozen=True)
class Split:
    """How scans are divided, where no file gives their split.

    Attributes:
        validation: Share of the training scans to choose the best step by, in [0, 1).
        seed: Decides which they are.
        train_ids: The training scans to use (`tasks.fewshot_subsets`); None for all.
        without: Scans to leave out of every split.
    """

    validation: float = 0.2
    seed: int = 1
    train_ids: frozenset[str] | None = None
    without: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise UsageError(
                f"validation is {self.validation}; give a share of the scans in [0, 1)."
            )


@dataclass(frozen=True)
class TuningData:
    """Scans to learn from, to choose the best step by, and to test on, all in one store.

    Attributes:
        layout: What they were found as.
        store: Folder of the prepared scans.
        new: Classes to learn.
        known: Other classes of the model that some scan labels; what a scan does not label is
            masked there.
        train: The scans to learn from.
        validation: The scans to choose the best step by.
        test: The scans that are only measured.
        notes: What a reader of results should know.
    """

    layout: str
    store: Path
    new: tuple[NewClass, ...]
    known: tuple[str, ...]
    train: tuple[StoredCase, ...]
    validation: tuple[StoredCase, ...]
    test: tuple[StoredCase, ...]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes to learn."""
        return tuple(each.name for each in self.new)

    @cached_property
    def descriptions(self) -> dict[str, dict[str, Any]]:
        """Case key → its case.json: sources with SHA-256, voxels, licence, notes."""
        cases = {case.key: case for case in (*self.train, *self.validation, *self.test)}
        return {key: read_description(case.folder) for key, case in sorted(cases.items())}

    @property
    def digest(self) -> str:
        """SHA-256 of the prepared data and the splits: what a resumed tuning must agree in."""
        parts = {
            "recipes": {key: about["recipe"] for key, about in self.descriptions.items()},
            "sources": {key: about["sources"] for key, about in self.descriptions.items()},
            "splits": {name: [case.key for case in cases] for name, cases in self._splits()},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def counts(self, name: str) -> dict[str, int]:
        """Return the number of scans of each split in which a class is seen."""
        return {
            split: sum(name in self.descriptions[case.key]["voxels"] for case in cases)
            for split, cases in self._splits()
        }

    def _splits(self) -> tuple[tuple[str, tuple[StoredCase, ...]], ...]:
        return (("train", self.train), ("validation", self.validation), ("test", self.test))


def read_data(
    path: str | Path,
    *,
    classes: Sequence[NewClass],
    work: str | Path,
    spacing_mm: float,
    old_classes: Sequence[str] = (),
    test: str | Path | None = None,
    split: Split = Split(),
    skip_broken: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> TuningData:
    """Read labelled scans for learning `classes`, and prepare them under `work`; resumable.

    The splits are in work/splits.json. That file is used again, also when it was edited, as long
    as it names the scans that there are.

    Args:
        path: A folder or a table, see `data.finding`.
        classes: The classes to learn; one that is in `old_classes` too is tuned further.
        work: Folder for the prepared scans.
        spacing_mm: Of the prepared scans, along every axis.
        old_classes: The model's; those that the files label are annotated too.
        test: Other scans, for testing only.
        split: How the scans are divided.
        skip_broken: Leave broken scans out instead of refusing all.
        workers: Processes that prepare the scans; None for one a core.
        progress: Show a bar.

    Returns:
        The scans, in their splits.

    Raises:
        UsageError: No class or no scan; a scan without a readable CT or with labels on another
            grid; a class that no label is named after, or whose mask is empty in every training
            scan; a test scan that is also trained on.
    """
    work = Path(work)
    if not classes:
        raise UsageError("No class to learn was given; name at least one.")
    naming = Naming(tuple(classes), tuple(old_classes))
    sources = _sources(path, test, naming, split)
    report = prepare(
        [(dataset, each.root) for each in sources for dataset in each.datasets],
        work / STORE,
        spacing_mm=spacing_mm,
        workers=workers,
        progress=progress,
    )
    if report.failed and not skip_broken:
        reasons = "\n  ".join(f"{key}: {why}" for key, why in report.failed.items())
        raise UsageError(
            f"{len(report.failed)} of the scans cannot be used:\n  {reasons}\nCorrect or remove "
            "them, or ask for broken scans to be skipped."
        )
    store = Store(work / STORE)
    cases = {key: store.case(key) for key in sorted({*report.prepared, *report.skipped})}
    notes = [f"{key} was left out: {why}" for key, why in report.failed.items()]
    scans = _Scans(sources, naming, store.manifest["cases"], tuple(cases))
    splits = _split(scans, split, work / SPLITS, notes)
    _refuse_empty(scans, splits["train"], spacing_mm)
    _refuse_shared(scans, splits)
    if len({*splits["train"], *splits["validation"]}) == 1:
        _note(
            notes,
            f"There is one scan, {splits['train'][0]}: it is trained on and validated on. The "
            "scores on it say what was learnt by heart, not what to expect of other scans.",
        )
    if read := naming.read_as(frozenset().union(*(each.labels for each in sources))):
        notes.append(read)
    found = {name for case in cases.values() for name in case.annotated}
    return TuningData(
        layout=sources[0].layout,
        store=work / STORE,
        new=naming.new,
        known=tuple(name for name in naming.old if name in found),
        train=tuple(cases[key] for key in splits["train"]),
        validation=tuple(cases[key] for key in splits["validation"]),
        test=tuple(cases[key] for key in splits["test"]),
        notes=tuple(notes),
    )


def _sources(
    path: str | Path, test: str | Path | None, naming: Naming, split: Split
) -> list[Source]:
    """What lies at the two paths; refused where no scan labels a class to learn."""
    sources = [find_source(Path(path), naming, only=split.train_ids, without=split.without)]
    naming.require(sources[0].labels, str(path))
    if test is not None:
        sources.append(find_source(Path(test), naming, _TEST, without=split.without))
        if not any(naming.has(each, sources[1].labels) for each in naming.new):
            naming.require(sources[1].labels, str(test))
    return sources


@dataclass(frozen=True)
class _Scans:
    """The prepared scans by their keys. entries: of the store's manifest."""

    sources: Sequence[Source]
    naming: Naming
    entries: Mapping[str, Any]
    keys: tuple[str, ...]

    def seen(self, key: str) -> frozenset[str]:
        """The classes to learn that a scan shows."""
        return frozenset(self.entries[key]["voxels"]) & {each.name for each in self.naming.new}

    def hash_of(self, key: str) -> str | None:
        """SHA-256 of the scan's image, or of one file of its series."""
        (source,) = (source for source in self.sources if key in source.cases)
        image = source.cases[key].image
        files = {
            source.root / file["path"]: file["sha256"] for file in self.entries[key]["sources"]
        }
        return next((sha for path, sha in files.items() if image in (path, *path.parents)), None)


# --- splits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Splits:
    """What splits.json holds: how it was drawn, and keys of scans."""

    settings: Mapping[str, float]
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def _split(scans: _Scans, split: Split, path: Path, notes: list[str]) -> dict[str, list[str]]:
    """Keys of each split: of the file, if it fits what there is; otherwise drawn and written."""
    settings = {"validation": split.validation, "seed": split.seed}
    if path.is_file():
        where = f"{path} (delete it to draw anew)"
        kept = read(_Splits, read_file(path), where, version=FORMAT_VERSION)
        if kept.settings == settings and {*kept.train, *kept.validation, *kept.test} == {
            *scans.keys
        }:
            return {name: list(getattr(kept, name)) for name in _NAMES}
        _note(notes, f"{path} was drawn anew: its scans or its settings were other ones.")
    splits = _drawn(scans, split, notes)
    content = {"format_version": FORMAT_VERSION, "settings": settings, **splits}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return splits


def _drawn(scans: _Scans, split: Split, notes: list[str]) -> dict[str, list[str]]:
    """Splits as the files have them, and validation out of the training scans otherwise."""
    said = {key: case.split for source in scans.sources for key, case in source.cases.items()}
    tests = [key for key in scans.keys if key.startswith(_TEST) or said.get(key) == "test"]
    rest = [key for key in scans.keys if key not in tests]
    validation = [key for key in rest if said.get(key) in _VALIDATION_NAMES]
    train = [key for key in rest if key not in validation]
    if not validation:
        shows = {key: scans.seen(key) for key in train}
        validation = draw_validation(train, shows, split.validation, split.seed)
        train = [key for key in train if key not in validation]
    if not validation and train:
        validation = list(train)
        if len(train) > 1:
            _note(
                notes,
                "There were too few scans to hold one out, so the best step was chosen on the "
                "training scans; it may be overfitted.",
            )
    return dict(zip(_NAMES, (sorted(train), sorted(validation), sorted(tests)), strict=True))


def _note(notes: list[str], text: str) -> None:
    """Note what a reader of results should know, and warn of it now."""
    notes.append(text)
    warnings.warn(text, DatasetWarning, stacklevel=2)


def draw_validation(
    keys: Sequence[str], shows: Mapping[str, frozenset[str]], share: float, seed: int
) -> list[str]:
    """Draw the cases to validate on: the wanted share, at least one.

    Only a case that shows a class is taken, and none without which a class would be missing from
    the rest; so there may be fewer, or none.

    Args:
        keys: Of the cases.
        shows: Classes to learn that each case shows.
        share: In [0, 1).
        seed: Decides the order in which cases are tried.

    Returns:
        Keys of the drawn cases.
    """
    wanted = max(1, round(share * len(keys))) if share > 0 and len(keys) > 1 else 0
    order = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    taken: list[str] = []
    for key in order:
        rest = [other for other in keys if other != key and other not in taken]
        left: frozenset[str] = frozenset().union(*(shows[other] for other in rest))
        if len(taken) < wanted and shows[key] and shows[key] <= left:
            taken.append(key)
    return taken


# --- checks ---------------------------------------------------------------------------------------


def _refuse_empty(scans: _Scans, train: Sequence[str], spacing_mm: float) -> None:
    if not train:
        raise UsageError(
            f"No training scan is left in {scans.sources[0].root}; all are for validation or "
            "testing. See its meta.csv, or splits.json in the working folder."
        )
    for each in scans.naming.new:
        if not any(each.name in scans.seen(key) for key in train):
            labels = listed(each.labels or (each.name,))
            raise UsageError(
                f"The mask of {each.name!r} (label {labels}) is empty in every training scan "
                f"({listed(list(train), 4)}) at {spacing_mm:g} mm. Label it in one of "
                "them, or leave the class out."
            )


def _refuse_shared(scans: _Scans, splits: Mapping[str, Sequence[str]]) -> None:
    """A scan that is trained on is no test, under whatever name."""
    learnt = {scans.hash_of(key): key for name in _NAMES[:2] for key in splits[name]}
    for key in splits["test"]:
        image = scans.hash_of(key)
        if image is not None and image in learnt:
            raise UsageError(
                f"The test scan {key} is the same file as {learnt[image]}, which is trained on. "
                "Give other scans for testing."
            )
