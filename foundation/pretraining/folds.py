"""Five-fold splits of a store's cases, written to a file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.errors import UsageError
from foundation.files import replacing

FOLDS = 5
FORMAT_VERSION = 1
# The training scans of MSD's liver task are those of LiTS under the same numbers.
_SAME_SCANS = {"10_03": "04"}


@dataclass(frozen=True)
class Folds:
    """Which fold each case is in. test: cases of the datasets' own test splits, in none."""

    seed: int
    fold_of: Mapping[str, int]
    test: frozenset[str] = frozenset()

    def cases(self, fold: int) -> frozenset[str]:
        """Keys of the cases of one fold.

        Raises:
            UsageError: there is no such fold.
        """
        if fold not in range(FOLDS):
            raise UsageError(f"fold is {fold}; there are folds 0 to {FOLDS - 1}.")
        return frozenset(key for key, where in self.fold_of.items() if where == fold)

    def write(self, path: Path) -> None:
        """Write as JSON: dataset → fold → keys."""
        datasets: dict[str, list[list[str]]] = {}
        for key in sorted(self.fold_of):
            folds = datasets.setdefault(key.split("/")[0], [[] for _ in range(FOLDS)])
            folds[self.fold_of[key]].append(key)
        values = {
            "format_version": FORMAT_VERSION,
            "seed": self.seed,
            "datasets": datasets,
            "test": sorted(self.test),
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def make_folds(cases: Mapping[str, Mapping[str, Any]], seed: int = 0) -> Folds:
    """Split the cases of a store's manifest, each dataset by itself.

    A case's fold depends on its key and the seed alone, so that it stays where it is when others
    are added. Scans that two datasets share are in one fold. A case whose manifest entry has the
    `split` "test" is in no fold.
    """
    test = frozenset(key for key, entry in cases.items() if entry.get("split") == "test")
    return Folds(seed, {key: _fold(key, seed) for key in sorted(cases) if key not in test}, test)


def _fold(key: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{group(key)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % FOLDS


def group(key: str) -> str:
    """What must stay together: the case, or the scan it shares with another dataset."""
    dataset, _, case = key.partition("/")
    number = re.search(r"(\d+)\D*$", case)
    if number and (dataset in _SAME_SCANS or dataset in _SAME_SCANS.values()):
        return f"{_SAME_SCANS.get(dataset, dataset)}/{int(number[1])}"
    return key


def read_folds(path: Path) -> Folds:
    """Read what `Folds.write` wrote.

    Raises:
        UsageError: there is no such file, or it is not one of folds.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {values['format_version']}, not {FORMAT_VERSION}")
        fold_of = {
            key: fold
            for folds in values["datasets"].values()
            for fold, keys in enumerate(folds)
            for key in keys
        }
        return Folds(int(values["seed"]), fold_of, frozenset(values["test"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read as a file of folds: {error}") from error


def held_out_cases(
    keys: list[str], folds: Folds | None, fold: int | None, hold_out: tuple[str, ...]
) -> tuple[frozenset[str], frozenset[str]]:
    """Cases to validate on, and cases not to train on: those and the test cases.

    hold_out: datasets or cases beside the fold.

    Raises:
        UsageError: one of `hold_out` is not in the store.
    """
    named = frozenset(key for key in keys if key in hold_out or key.split("/")[0] in hold_out)
    known = {*keys, *(key.split("/")[0] for key in keys)}
    if missing := [name for name in hold_out if name not in known]:
        raise UsageError(
            f"Cannot hold out {', '.join(missing)}: the store has no such dataset or case."
        )
    if folds is None or fold is None:
        return named, named | (folds.test if folds else frozenset())
    validated = (folds.cases(fold) | named) & frozenset(keys)
    return validated, validated | folds.test
