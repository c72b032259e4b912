"""Is a store as it was written? Every file of every case against its SHA-256."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from foundation.data.store.arrays import (
    CENTRES,
    CT,
    FILES,
    LABELS,
    Store,
    StoredCase,
    check_file,
    read_description,
)
from foundation.errors import VolumeError

_AGREE = ("annotated", "voxels", "shape", "has_ct", "sources", "weight")  # manifest and case


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        store: Its folder.
        cases: How many cases its manifest has.
        damaged: Key of a case → what is wrong with it.
        without_sums: Keys of cases that were prepared before there were sums. They could be read.
    """

    store: Path
    cases: int
    damaged: Mapping[str, str]
    without_sums: tuple[str, ...]


def check_store(store: str | Path, *, progress: bool = True) -> Check:
    """Read every file of a store and compare it with the sum that it was written with.

    A case of an older version, without sums, is read whole instead: that finds a file that is cut
    or gone, and not every changed value.

    Args:
        store: Its folder.
        progress: Show a bar, on standard error.

    Returns:
        What is damaged.

    Raises:
        UsageError: The folder holds no store, or its manifest is damaged.
    """
    opened = Store(store)
    damaged: dict[str, str] = {}
    without: list[str] = []
    hidden = None if progress else True  # None: hidden where no terminal shows it
    for key in tqdm(opened.keys(), unit="case", disable=hidden, file=sys.stderr):
        try:
            if not _check_case(key, opened.case(key), opened.manifest["cases"][key]):
                without.append(key)
        except VolumeError as error:
            damaged[key] = str(error)
    return Check(opened.path, len(opened), damaged, tuple(without))


def _check_case(key: str, case: StoredCase, entry: Mapping[str, Any]) -> bool:
    """Whether the case has sums; they are right.

    Raises:
        VolumeError: A file is damaged, or the case is another one than the manifest has.
    """
    about = read_description(case.folder)
    other = [name for name in _AGREE if name in entry and entry[name] != about.get(name)]
    if other or case.key != key:
        said = f"it has another {', '.join(other)}" if other else f"it is {case.key}"
        raise VolumeError(f"{case.folder} is not the case that the manifest has: {said}.")
    if about.get(FILES):
        missing = {LABELS, CENTRES, *([CT] if case.has_ct else [])} - about[FILES].keys()
        if missing:
            raise VolumeError(f"{case.folder} has no sum of {', '.join(sorted(missing))}.")
        for name, sha256 in about[FILES].items():
            check_file(case.folder / name, sha256, again=True)
        return True
    case.read_ct()
    case.read_labels()
    dict(case.centres)
    return False
