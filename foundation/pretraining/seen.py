"""Which scans a model was trained on, so that a test can leave them out by name.

    trained = trained_on("universal-ct")
    left_out = trained.among(get_dataset("15"), cases) if trained else {}

The record is the manifest of the store that the weights came from: beside the card of weights that
the package knows, or of the run in whose folder the model lies.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from foundation.data import Case, Dataset, Store
from foundation.files import file_sha256
from foundation.hub.cards import card_names, cards_folder
from foundation.pretraining.folds import group, held_out_cases, read_folds
from foundation.pretraining.reading import load_config
from foundation.pretraining.run import CONFIG, FOLDS


@dataclass(frozen=True)
class TrainedOn:
    """The record of a model's training data.

    Attributes:
        cases: Key of a training case → its entry in the manifest.
    """

    cases: Mapping[str, Mapping[str, Any]]

    def among(self, dataset: Dataset, cases: Iterable[Case]) -> dict[str, str]:
        """Find the scans of a dataset that the model was trained on.

        A scan is one of them if both have one key or are known to share a scan (LiTS and MSD
        liver); if a training case is named after the dataset and ends in the scan's number, as
        "totalsegmentator_s0327" is s0327 of TotalSegmentator; or if they have a file in common, by
        SHA-256. So a scan too many is left out rather than one too few. What was copied under
        another name and stored anew is not found.

        Args:
            dataset: That is measured on.
            cases: Its scans.

        Returns:
            Id of a scan → key of the training case that it is.
        """
        found = {}
        for case in cases:
            key = f"{dataset.id}/{case.id}"
            same = self._groups.get(group(key)) or self._numbered(dataset, case)
            same = same or self._by_file(case)
            if same:
                found[case.id] = same
        return found

    @cached_property
    def _groups(self) -> dict[str, str]:
        return {group(key): key for key in self.cases}

    @cached_property
    def _files(self) -> dict[int, dict[str, str]]:
        """Size of a file → SHA-256 → key, so that only files of a known size are read."""
        files: dict[int, dict[str, str]] = {}
        for key, entry in self.cases.items():
            for source in entry.get("sources", ()):
                files.setdefault(int(source["bytes"]), {})[source["sha256"]] = key
        return files

    def _numbered(self, dataset: Dataset, case: Case) -> str | None:
        name, number = _words(re.sub(r" v\d+$", "", dataset.name)), _number(case.id)
        for key in self.cases:
            known = key.partition("/")[2]
            named = _words(known).startswith(f"{name}_")
            if named and number is not None and _number(known) == number:
                return key
        return None

    def _by_file(self, case: Case) -> str | None:
        # Of masks of single structures, empty ones are alike in many scans.
        labels = case.labels if len(case.labels) == 1 else ()
        for path in (case.image, *labels):
            if path is not None and path.is_file():
                known = self._files.get(path.stat().st_size, {})
                if known and (key := known.get(file_sha256(path))):
                    return key
        return None


def trained_on(name_or_path: str | Path) -> TrainedOn | None:
    """Read what is recorded of the data that a model was trained on.

    Args:
        name_or_path: A name of `list_models()`, or a folder of a model in that of its run, as
            `pretrain` leaves it.

    Returns:
        The record, with that of the weights that a run started from; None where there is none, as
        of weights that others published.

    Raises:
        UsageError: The record of a run is damaged, or its store is gone.
    """
    if str(name_or_path) in card_names():
        path = cards_folder() / f"{name_or_path}.manifest.json"
        if not path.is_file():
            return None
        return _used(json.loads(path.read_text(encoding="utf-8"))["cases"])
    folder = Path(name_or_path)
    run = next((each for each in (folder, folder.parent) if (each / CONFIG).is_file()), None)
    return None if run is None else _of_run(run)


def _of_run(run: Path) -> TrainedOn | None:
    """What the run saw, and what the weights that it started from had seen; None if unknown."""
    config = load_config(run / CONFIG)
    before = TrainedOn({}) if config.initialise_from is None else trained_on(config.initialise_from)
    if before is None or config.store is None:
        return before
    cases = Store(config.store).manifest["cases"]
    folds = read_folds(run / FOLDS) if (run / FOLDS).is_file() else None
    given = config.validation
    if any(stage.all_cases for stage in config.stages):
        out = folds.test if folds else frozenset()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of folds with few scans: the run has warned of them
            out = held_out_cases([*cases], folds, given.fold, given.hold_out)[1]
    own = _used({key: entry for key, entry in cases.items() if key not in out})
    return TrainedOn({**before.cases, **own.cases})


def _used(cases: Mapping[str, Mapping[str, Any]]) -> TrainedOn:
    """Without what has the weight 0: it is never drawn."""
    return TrainedOn({key: entry for key, entry in cases.items() if entry.get("weight", 1) > 0})


def _words(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def _number(name: str) -> int | None:
    found = re.search(r"(\d+)$", name)
    return int(found[1]) if found else None
