"""Five-fold splits of a store's cases, as even as can be, written to a file."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.errors import UsageError, listed
from foundation.files import replacing
from foundation.settings import read, read_file

FOLDS = 5
FORMAT_VERSION = 1
# The training scans of MSD's liver task are those of LiTS under the same numbers.
_SAME_SCANS = {"10_03": "04"}
FEW_CASES = 3  # a mean over fewer says little


@dataclass(frozen=True)
class Folds:
    """Which fold each case is in.

    Attributes:
        seed: What the split was made by.
        fold_of: Key of a case → its fold, from 0 on.
        test: Cases of the datasets' own test splits, which are in no fold.
    """

    seed: int
    fold_of: Mapping[str, int]
    test: frozenset[str] = frozenset()

    def cases(self, fold: int) -> frozenset[str]:
        """Find the cases of one fold.

        Args:
            fold: 0 to 4.

        Returns:
            Their keys.

        Raises:
            UsageError: There is no such fold.
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
    """Split the cases of a store's manifest, each dataset by itself, as evenly as can be.

    Folds of a dataset differ by one case at most. Scans that two datasets share are in one fold. A
    case whose manifest entry has the `split` "test" is in no fold. Cases that come later change the
    split of their own dataset, so a run keeps the file that it has written.

    Args:
        cases: Key of a case → its entry in the manifest.
        seed: Another one gives another split.

    Returns:
        The split.
    """
    test = frozenset(key for key, entry in cases.items() if entry.get("split") == "test")
    groups: dict[str, list[str]] = {}
    for key in cases.keys() - test:
        groups.setdefault(group(key), []).append(key)
    datasets = {name: {key.split("/")[0] for key in keys} for name, keys in groups.items()}
    count = {dataset: [0] * FOLDS for each in datasets.values() for dataset in each}
    fold_of: dict[str, int] = {}
    # Shared scans first: the others then even out both datasets.
    for name in sorted(groups, key=lambda name: (-len(datasets[name]), _chance(seed, name))):
        first = _chance(seed, name.split("/")[0])  # not all datasets' odd cases in one fold
        fold = min(
            range(FOLDS),
            key=lambda fold: (sum(count[d][fold] for d in datasets[name]), (fold - first) % FOLDS),
        )
        for key in groups[name]:
            fold_of[key] = fold
            count[key.split("/")[0]][fold] += 1
    return Folds(seed, dict(sorted(fold_of.items())), test)


def _chance(seed: int, name: str) -> int:
    """A number that depends on the seed and the name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


def group(key: str) -> str:
    """What must stay together: the case, or the scan it shares with another dataset."""
    dataset, _, case = key.partition("/")
    number = re.search(r"(\d+)\D*$", case)
    if number and (dataset in _SAME_SCANS or dataset in _SAME_SCANS.values()):
        return f"{_SAME_SCANS.get(dataset, dataset)}/{int(number[1])}"
    return key


@dataclass(frozen=True)
class _File:
    """What `Folds.write` writes: dataset → fold → keys."""

    seed: int
    datasets: Mapping[str, tuple[tuple[str, ...], ...]]
    test: tuple[str, ...]


def read_folds(path: Path) -> Folds:
    """Read what `Folds.write` wrote.

    Args:
        path: A JSON file.

    Returns:
        The split.

    Raises:
        UsageError: There is no such file, or it is not one of folds.
    """
    where = f"{path} cannot be read as a file of folds"
    content = read(_File, read_file(path), where, version=FORMAT_VERSION)
    fold_of = {
        key: fold
        for folds in content.datasets.values()
        for fold, keys in enumerate(folds)
        for key in keys
    }
    return Folds(content.seed, fold_of, frozenset(content.test))


def held_out_cases(
    keys: list[str], folds: Folds | None, fold: int | None, hold_out: tuple[str, ...]
) -> tuple[frozenset[str], frozenset[str]]:
    """Choose the cases to validate on, and those not to train on: the same and the test cases.

    Warns where a fold holds few cases, or none of a dataset.

    Args:
        keys: Of all cases of the store.
        folds: Their split.
        fold: The one to hold out; None for none.
        hold_out: Datasets or cases beside the fold.

    Returns:
        Keys of the cases to validate on, and of those not to train on.

    Raises:
        UsageError: One of `hold_out` is not in the store, or none of its cases is in the fold.
    """
    named = frozenset(key for key in keys if key in hold_out or key.split("/")[0] in hold_out)
    known = {*keys, *(key.split("/")[0] for key in keys)}
    if missing := [name for name in hold_out if name not in known]:
        raise UsageError(
            f"Cannot hold out {', '.join(missing)}: the store has no such dataset or case."
        )
    if folds is None or fold is None:
        return named, named | (folds.test if folds else frozenset())
    inside = folds.cases(fold) & frozenset(keys)
    split = [key for key in keys if key in folds.fold_of]
    if not inside:
        filled = sorted({folds.fold_of[key] for key in split})
        raise UsageError(
            f"Fold {fold} holds none of the store's {len(keys)} cases: there is nothing to "
            f"validate on. Folds with cases: {', '.join(map(str, filled)) or 'none'}. Or name "
            "cases in validation.hold_out."
        )
    empty = sorted({key.split("/")[0] for key in split} - {key.split("/")[0] for key in inside})
    if len(inside) < FEW_CASES or empty:
        lacking = f", none of {listed(empty)}" if empty else ""
        warnings.warn(
            f"Fold {fold} holds {len(inside)} of the store's {len(keys)} cases{lacking}: a "
            "validation on few cases says little about others.",
            stacklevel=2,
        )
    return inside | named, inside | named | folds.test
