"""The data of an experiment: what is trained on, what is measured, and by which hashes it is known.

In the smoke and mini sizes they are the generated world; in the real one they are the datasets of
the command line.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock
from world import World, build_world

from foundation import UsageError, get_dataset, replacing
from foundation import prepare as prepare_store
from foundation.evaluation import path_sha256
from foundation.pretraining import make_folds, read_folds


@dataclass(frozen=True)
class TestSet:
    """Scans to measure on.

    Attributes:
        dataset: A YAML file, or an id of the paper's.
        root: Its folder.
        cases: Ids of the scans; None for all.
    """

    dataset: str
    root: str
    cases: tuple[str, ...] | None = None


class Data:
    """The data of one experiment in one size.

    Args:
        size: "smoke", "mini" or "real".
        output: Folder of everything that the experiment makes.
        given: All command line arguments.
        reads: Whether the experiment is about data at all; without data there are no hashes.
        prepares: Whether the data are prepared as one store, by whose manifest they are known; else
            each folder is hashed as it is.
    """

    def __init__(
        self, size: str, output: Path, given: Namespace, *, reads: bool, prepares: bool
    ) -> None:
        self.size, self.output, self.given = size, output, given
        self.reads, self.prepares = reads, prepares
        self._like: Sequence[str] | None = None
        self._prepared: dict[tuple[str, ...] | None, Path] = {}

    @cached_property
    def world(self) -> World:
        """The generated world of the smoke and mini sizes; one for all scripts of a size."""
        with self.alone(f"world-{self.size}") as folder:
            return build_world(folder, "smoke" if self.size == "smoke" else "mini")

    @contextmanager
    def alone(self, name: str) -> Iterator[Path]:
        """Give a folder that scripts share; another process that wants it waits.

        Args:
            name: Of the folder, beside the outputs of the scripts.
        """
        folder = self.output.parent / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            yield folder

    @property
    def generated(self) -> bool:
        """Whether the data are generated."""
        return self.size != "real"

    @property
    def fold(self) -> int | None:
        """The fold of the data to train on that is held out; None where other bodies are there."""
        return None if self.generated else 0

    def training(self, like: Sequence[str] | None = None) -> list[tuple[str, str]]:
        """Return the datasets to train on, as `prepare` takes them.

        Args:
            like: Names of the world's datasets, in the generated sizes; all partly labelled ones if
                not given. A real run trains on all datasets of the command line.
        """
        if self.generated:
            names = self.world.datasets("train") if like is None else like
            return [self.world.dataset(name) for name in names]
        return [_pair(text) for text in self.given.data]

    def tests(self, like: Sequence[str] = ("test",), fold: int | None = None) -> list[TestSet]:
        """Return the scans to measure on.

        Args:
            like: Names of the world's datasets, in the generated sizes.
            fold: Measure on this fold of the training data instead, where `--test` names none.
        """
        if fold is not None and not self.given.test:
            return self.held_out(fold)
        if self.generated:
            return [TestSet(*self.world.dataset(name)) for name in like]
        return [TestSet(*_pair(text)) for text in self.given.test] or self.held_out(0)

    @cached_property
    def folds(self) -> Path:
        """The file of the five folds: one split for every training, seed and measurement."""
        from foundation.data import Store

        path = self.output / "folds.json"
        if not path.is_file():
            make_folds(Store(self.store()).manifest["cases"]).write(path)
        return path

    def held_out(self, fold: int) -> list[TestSet]:
        """Return the scans of one of the five folds of the data to train on."""
        held_out = read_folds(self.folds).cases(fold)
        found = []
        for dataset, root in self.training(self._like):
            prefix = f"{get_dataset(dataset).id}/"
            ids = tuple(sorted(k.removeprefix(prefix) for k in held_out if k.startswith(prefix)))
            if ids:
                found.append(TestSet(dataset, root, ids))
        return found

    def store(self, like: Sequence[str] | None = None) -> Path:
        """Prepare the datasets to train on; finished scans are left alone.

        Args:
            like: As of `training`. One experiment prepares one set of datasets.
        """
        if like is not None:
            self._like = like
        if self.given.store:
            return Path(self.given.store)
        key = None if self._like is None else tuple(self._like)
        if key in self._prepared:  # looking at every scan again takes minutes on real data
            return self._prepared[key]
        shared = self.generated and self._like is None
        own = f"{self.output.name}/store"
        datasets = self.training(self._like)
        self._prepared[key] = self.prepare(datasets, f"store-{self.size}" if shared else own)
        return self._prepared[key]

    def prepare(
        self, datasets: Sequence[tuple[Any, Any]], name: str, spacing_mm: float | None = None
    ) -> Path:
        """Prepare datasets as a store; finished scans are left alone.

        Args:
            datasets: As `foundation.prepare` takes them.
            name: Of the store's folder, beside the outputs of the scripts.
            spacing_mm: Of the store; the world's, or 1.5 mm, if not given.
        """
        usual = self.world.spacing_mm if self.generated else 1.5
        with self.alone(name) as folder:
            report = prepare_store(
                datasets,
                folder,
                spacing_mm=spacing_mm or usual,
                workers=1 if self.generated else None,
                progress=not self.generated,
            )
        if report.failed:
            print(f"{len(report.failed)} scans cannot be read: {report.failed}", file=sys.stderr)
        return report.store

    @property
    def tolerance_mm(self) -> float:
        """Of the surface Dice: a voxel of the generated world; 2 mm on real scans."""
        return self.world.spacing_mm if self.generated else 2.0

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the world's datasets; or of the store's manifest, and of other folders."""
        if not self.reads:
            return {}
        if self.generated:
            return {f"world-{self.size}/{name}": h for name, h in self.world.sha256.items()}
        path = self.output / "data.json"
        stored = self.given.store or (self.given.data and self.prepares)
        if not path.is_file():  # hashing every file of a dataset takes long, and is done once
            found = {}
            for text in [*self.given.test, *([] if stored else self.given.data)]:
                dataset, root = _pair(text)
                found[get_dataset(dataset).id] = path_sha256(root)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        hashes: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        if stored:
            hashes["store/manifest.json"] = path_sha256(self.store() / "manifest.json")
        return hashes


# --- helpers ---


def _pair(text: str) -> tuple[str, str]:
    dataset, equals, root = text.partition("=")
    if not (dataset and equals and root):
        raise UsageError(f"{text!r} is not ID=DIR, e.g. 04=/data/LiTS or my-ct.yaml=/data/my-ct.")
    return dataset, root
