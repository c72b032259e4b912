"""A few labelled scans, read, checked, split by case, in a store of their own.

Everything wrong with them is an error here, before a step is trained: of a handful of scans each
one counts, and none is left out in silence.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
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

SPLITS, STORE = "splits.json", "store"
FORMAT_VERSION = 1
_VALIDATION_NAMES = ("val", "validation", "valid")


@dataclass(frozen=True)
class TuningData:
    """Scans to learn from, to choose the best step by, and to test on, all in one store.

    layout: what they were found as. new: classes to learn. known: other classes of the model that
    some scan labels; what a scan does not label is masked there. notes: what a reader of results
    should know.
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
        """Case key → what its case.json says: sources with SHA-256, voxels, licence, notes."""
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
        """Split → number of scans in which a class is seen."""
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
    train_ids: Collection[str] | None = None,
    validation: float = 0.2,
    seed: int = 1,
    strict: bool = False,
    skip_broken: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> TuningData:
    """Read labelled scans for learning `classes`, and prepare them under `work`; resumable.

    path: a folder or table, see `finding`. old_classes: the model's; those that the files label
    are annotated too. test: other scans, for testing only. train_ids: the training scans to use
    (`tasks.fewshot_subsets`); where the files say nothing of splits, validation comes out of them.
    validation: share of the training scans to choose the best step by, where the files do not say.
    strict: refuse a single scan instead of validating on it. skip_broken: leave broken scans out
    instead of refusing all. The splits are in work/splits.json, which is used again, also edited,
    as long as it names the scans that there are.

    Raises:
        UsageError: no scan; a scan without a readable CT or with labels on another grid; a class
            that no label is named after, or whose mask is empty in every training scan; a test scan
            that is also trained on; a single scan where `strict`.
    """
    work = Path(work)
    if not 0 <= validation < 1:
        raise UsageError(f"validation is {validation}; give a share of the scans in [0, 1).")
    naming = Naming(tuple(classes), tuple(old_classes))
    only = None if train_ids is None else frozenset(train_ids)
    source = find_source(Path(path), naming, only=only)
    naming.require(source.labels, str(path))
    sources = [source]
    if test is not None:
        sources.append(find_source(Path(test), naming, "test-"))
        if not any(naming.has(each, sources[1].labels) for each in naming.new):
            naming.require(sources[1].labels, str(test))
    report = prepare(
        [(adapter, each.root) for each in sources for adapter in each.adapters],
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
    seen = {key: frozenset(store.manifest["cases"][key]["voxels"]) for key in cases}
    notes = [f"{key} was left out: {why}" for key, why in report.failed.items()]
    splits = _splits(cases, sources, naming, seen, (validation, seed), work, notes)
    _refuse_empty(naming, splits, seen, sources, spacing_mm)
    _refuse_shared(splits, sources, store.manifest["cases"])
    if len({*splits["train"], *splits["validation"]}) == 1:
        _warn_of_one(splits["train"][0], strict, notes)
    found = {name for case in cases.values() for name in case.annotated}
    return TuningData(
        layout=source.layout,
        store=work / STORE,
        new=naming.new,
        known=tuple(name for name in naming.old if name in found),
        train=tuple(cases[key] for key in splits["train"]),
        validation=tuple(cases[key] for key in splits["validation"]),
        test=tuple(cases[key] for key in splits["test"]),
        notes=tuple(notes),
    )


# --- splits ---------------------------------------------------------------------------------------


def _splits(
    cases: Collection[str],
    sources: Sequence[Source],
    naming: Naming,
    seen: Mapping[str, frozenset[str]],
    share_and_seed: tuple[float, int],
    work: Path,
    notes: list[str],
) -> dict[str, list[str]]:
    """Keys of each split: of the file, if it fits what there is; otherwise drawn and written."""
    share, seed = share_and_seed
    settings = {"validation": share, "seed": seed}
    path = work / SPLITS
    names = frozenset(each.name for each in naming.new)
    kept = _read_splits(path)
    if kept is not None and kept.get("settings") == settings:
        splits = {name: list(kept[name]) for name in ("train", "validation", "test")}
        if {key for keys in splits.values() for key in keys} == set(cases):
            return splits
    if kept is not None:
        notes.append(f"{path} was drawn anew: its scans or its settings were other ones.")
        warnings.warn(notes[-1], DatasetWarning, stacklevel=4)
    said = {key: split for each in sources for key, split in each.splits.items() if key in cases}
    tests = [key for key in cases if key.startswith("test-") or said.get(key) == "test"]
    validation = [k for k in cases if said.get(k) in _VALIDATION_NAMES and k not in tests]
    train = [key for key in cases if key not in {*tests, *validation}]
    if not validation:
        validation = draw_validation(train, {k: seen[k] & names for k in train}, share, seed)
        train = [key for key in train if key not in validation]
    if not validation and train:
        validation = list(train)
        if len(train) > 1:
            notes.append(
                "Validated on the training scans: none could be spared for validation alone, so "
                "that the best step is chosen by what was learnt by heart."
            )
            warnings.warn(notes[-1], DatasetWarning, stacklevel=4)
    splits = {"train": sorted(train), "validation": sorted(validation), "test": sorted(tests)}
    content = {"format_version": FORMAT_VERSION, "settings": settings, **splits}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return splits


def draw_validation(
    keys: Sequence[str], shows: Mapping[str, frozenset[str]], share: float, seed: int
) -> list[str]:
    """Cases to validate on: the wanted share, at least one, in an order that a seed decides.

    shows: classes to learn that each case holds. Only a case that holds one is taken, and none
    without which a class would be missing from the rest; so there may be fewer, or none.
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


def _read_splits(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lists = all(isinstance(content[name], list) for name in ("train", "validation", "test"))
        if not lists or content["format_version"] != FORMAT_VERSION:
            raise ValueError("not one of splits")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as splits: {error!r}. Delete it.") from error
    return dict(content)


# --- checks ---------------------------------------------------------------------------------------


def _refuse_empty(
    naming: Naming,
    splits: Mapping[str, Sequence[str]],
    seen: Mapping[str, frozenset[str]],
    sources: Sequence[Source],
    spacing_mm: float,
) -> None:
    if not splits["train"]:
        raise UsageError(
            f"No training scan is left in {sources[0].root}; all are for validation or testing. "
            "See its meta.csv, or splits.json in the working folder."
        )
    for each in naming.new:
        if not any(each.name in seen[key] for key in splits["train"]):
            labels = listed(each.labels or (each.name,))
            raise UsageError(
                f"The mask of {each.name!r} (label {labels}) is empty in every training scan "
                f"({listed(list(splits['train']), 4)}) at {spacing_mm:g} mm. Label it in one of "
                "them, or leave the class out."
            )


def _refuse_shared(
    splits: Mapping[str, Sequence[str]], sources: Sequence[Source], entries: Mapping[str, Any]
) -> None:
    """A scan that is trained on says nothing as a test, under whatever name."""
    images: dict[str, str] = {}
    for each in sources:
        for key, path in each.images.items():
            for file in entries[key]["sources"] if key in entries else ():
                if (each.root / file["path"]) == path or path in (each.root / file["path"]).parents:
                    images.setdefault(key, file["sha256"])
    learnt = {images[k]: k for name in ("train", "validation") for k in splits[name] if k in images}
    for key in splits["test"]:
        if (other := learnt.get(images.get(key, ""))) is not None:
            raise UsageError(
                f"The test scan {key} is the same file as {other}, which is trained on. Give other "
                "scans for testing."
            )


def _warn_of_one(key: str, strict: bool, notes: list[str]) -> None:
    text = f"There is one scan, {key}: it is trained on and validated on"
    if strict:
        raise UsageError(f"{text}, which shows nothing of other scans. Label at least one more.")
    notes.append(
        f"{text}. The scores on it say what was learnt by heart, not what to expect of other scans."
    )
    warnings.warn(notes[-1], DatasetWarning, stacklevel=3)
