"""Prepare whole datasets into a store: in parallel, resumable, one broken scan skipped and named.

A case is written under a temporary name and renamed when it is whole. Whether it must be done again
is decided by its own `case.json` (hashes of its sources, settings, this code's version), so that a
run killed at any moment is completed by running it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from foundation.data import Case, Dataset, get_dataset
from foundation.data.store.arrays import (
    CASE,
    CASES,
    CENTRES,
    CT,
    FILES,
    FORMAT_VERSION,
    LABELS,
    check_file,
    read_description,
)
from foundation.data.store.harmonise import Settings, harmonise
from foundation.data.store.manifest import (
    ManifestWriter,
    differences,
    file_hashes,
    read_expected,
    relative,
    source_files,
)
from foundation.data.store.processes import in_processes, refuse_while_starting
from foundation.data.store.writing import write_case
from foundation.errors import UniversalCTError, UsageError, listed
from foundation.files import recover_folder, replacing_folder

# Counted up when the same source gives another result, so that stores are brought up to date. The
# package's version does not do: it would redo thousands of scans for a change elsewhere.
RECIPE_VERSION = 1
SPACING_LIMITS_MM = (0.3, 20.0)
MOST_WORKERS = 8  # by default; a large scan takes a few GB in each


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        store: Its folder.
        prepared, skipped: Keys of the store.
        failed: Case → why.
    """

    store: Path
    prepared: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: Mapping[str, str]


@dataclass(frozen=True)
class _Job:
    """One case to prepare; goes to a worker process."""

    dataset: Dataset
    case: Case
    root: Path
    store: Path
    settings: Settings
    overwrite: bool

    @property
    def key(self) -> str:
        return f"{self.case.dataset}/{self.case.id}"

    @property
    def folder(self) -> Path:
        return self.store / CASES / self.case.dataset / self.case.id


@dataclass(frozen=True)
class _Outcome:
    """What became of a case: its description, or why there is none."""

    description: Mapping[str, Any] | None = None
    error: str = ""
    skipped: bool = False
    warnings: tuple[str, ...] = ()


def prepare(
    datasets: Iterable[tuple[str | Dataset, str | Path]],
    store: str | Path,
    *,
    spacing_mm: float = 1.5,
    femoral_heads: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    manifest: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Harmonise all cases of `datasets` into `store`; what is there and unchanged is left alone.

    Args:
        datasets: Pairs of a dataset (see `get_dataset`) and the folder that it lies in.
        store: The folder to prepare into.
        spacing_mm, femoral_heads: See `harmonise.Settings`.
        workers: Processes; 1 works in this one, None is one a core.
        overwrite: Prepare finished cases again.
        manifest: Of a store; if the sources differ from those it lists, nothing is prepared.
        progress: Show a bar, on standard error.

    Returns:
        Which cases were prepared, skipped and failed.

    Raises:
        UsageError: Unknown dataset, no case found, settings that do not fit the store, two cases
            of one name, another run is writing to the store, or a script without a main guard
            asks for several workers.
        UniversalCTError: The sources differ from `manifest`.
    """
    if workers != 1:
        refuse_while_starting()
    store = Path(store)
    settings = Settings(spacing_mm, femoral_heads)
    low, high = SPACING_LIMITS_MM
    if not low <= spacing_mm <= high:
        raise UsageError(f"spacing_mm is {spacing_mm}; allowed is {low} to {high} mm.")
    if workers is not None and workers < 1:
        raise UsageError(f"workers is {workers}; give 1 or more.")
    jobs, incomplete = _find_jobs(datasets, store, settings, overwrite)
    if manifest is not None:
        _refuse_other_sources(jobs, read_expected(Path(manifest), settings.spacing_mm))
    store.mkdir(parents=True, exist_ok=True)
    with _only_writer(store):
        for left in (store / CASES).glob("*/.?*.???"):  # of a run that was killed
            recover_folder(left.with_name(left.name[1:-4]))
        prompts = {
            name: prompt
            for dataset in {id(job.dataset): job.dataset for job in jobs}.values()
            for name, prompt in dataset.prompts.items()
        }
        writer = ManifestWriter(store, settings.spacing_mm, prompts)
        gone = writer.begin([job.key for job in jobs], {job.case.dataset for job in jobs})
        if gone:
            _say(f"No longer found, dropped from the manifest: {listed(gone)}.")
        for key, why in incomplete.items():
            _say(f"{key} is left out: {why}")
            writer.record(key, None, why)
        try:
            report = _run(jobs, writer, workers or min(os.cpu_count() or 1, MOST_WORKERS), progress)
        finally:
            writer.save()
    return replace(report, failed={**incomplete, **report.failed})


# --- what is to be done -------------------------------------------------------------------------


def _find_jobs(
    datasets: Iterable[tuple[str | Dataset, str | Path]],
    store: Path,
    settings: Settings,
    overwrite: bool,
) -> tuple[list[_Job], dict[str, str]]:
    """The cases that are there, and why others are incomplete."""
    jobs: list[_Job] = []
    incomplete: dict[str, str] = {}
    for given, root in datasets:
        dataset = get_dataset(given) if isinstance(given, str) else given
        cases, survey, left_out = dataset.survey(Path(root))
        cases = cases or dataset.find(root)  # an error with what was expected
        if left_out:
            _say(f"{dataset.name}: left out: {listed(left_out, 4)}")
        for id_, why in survey.faults:
            key, why = f"{dataset.id}/{id_}", why.replace(f"{root}{os.sep}", "")
            incomplete[key] = f"{incomplete[key]} {why}" if key in incomplete else why
        jobs += [_Job(dataset, case, Path(root), store, settings, overwrite) for case in cases]
    if not jobs:
        raise UsageError("No dataset given; give DATASET=DIR, see `universal-ct datasets`.")
    count = Counter(job.key for job in jobs)
    if twice := sorted(key for key, times in count.items() if times > 1):
        raise UsageError(f"Found twice: {listed(twice)}. Each case needs a name of its own.")
    for job in jobs:
        for part in (job.case.dataset, job.case.id):
            if not re.fullmatch(r"[\w+-][\w.+-]*", part):
                raise UsageError(f"{part!r} cannot name a folder; use letters, digits, _ . + -")
    return jobs, incomplete


def _refuse_other_sources(jobs: Sequence[_Job], expected: Mapping[str, Any]) -> None:
    found = {job.key: (job.root, source_files(job.case)) for job in jobs}
    datasets = {job.case.dataset for job in jobs}
    wrong = differences(expected, {job.case.dataset: job.root for job in jobs}, found.keys())
    for key, (root, files) in found.items():
        if (entry := expected["cases"].get(key)) is not None:
            listed_there = {source["path"] for source in entry["sources"]}
            here = {relative(path, root) for path in files}
            wrong += [f"{key}: {path} is not in the manifest" for path in here - listed_there]
    if unknown := sorted(datasets - {entry["dataset"] for entry in expected["cases"].values()}):
        wrong.append(f"the manifest has no dataset {listed(unknown)}")
    if wrong:
        raise UniversalCTError(
            f"The data differ from the manifest in {len(wrong)} places; nothing was prepared:\n  "
            + "\n  ".join(sorted(wrong))
        )


@contextmanager
def _only_writer(store: Path) -> Iterator[None]:
    """Hold the store's lock; the system frees it even when the process is killed."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two runs at once are the user's own risk there
        yield
        return
    with (store / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"Another `universal-ct prepare` is writing to {store}. Wait until it ends."
            ) from error
        yield


# --- running ------------------------------------------------------------------------------------


def _run(jobs: Sequence[_Job], writer: ManifestWriter, workers: int, progress: bool) -> Report:
    prepared: list[str] = []
    skipped: list[str] = []
    failed: dict[str, str] = {}
    if workers > 1 and len(jobs) > 1:
        results = in_processes(_attempt, jobs, workers)
    else:
        results = ((job, _attempt(job)) for job in jobs)
    hidden = None if progress else True  # None: hidden where no terminal shows it
    with tqdm(total=len(jobs), unit="case", disable=hidden, file=sys.stderr) as bar:
        for job, given in results:
            outcome = given or _Outcome(error="its process died: out of memory, or a crash.")
            for text in outcome.warnings:
                _say(f"{job.key}: {text}")
            if outcome.description is None:
                failed[job.key] = outcome.error
                _say(f"{job.key} failed and was skipped: {outcome.error}")
            else:
                (skipped if outcome.skipped else prepared).append(job.key)
            writer.record(job.key, outcome.description, outcome.error)
            bar.update()
    return Report(
        writer.store, tuple(sorted(prepared)), tuple(sorted(skipped)), dict(sorted(failed.items()))
    )


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


# --- one case -----------------------------------------------------------------------------------


def _attempt(job: _Job) -> _Outcome:
    """Prepare one case; whatever goes wrong with it must not cost the others."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            outcome = _prepare_case(job)
        except Exception as error:
            text = str(error) or "no reason given"
            if not isinstance(error, UniversalCTError | OSError):
                text = f"{type(error).__name__}: {text}"
            # Manifests are shared: they name files as the sources do, relative to the dataset.
            outcome = _Outcome(error=text.replace(f"{job.root}{os.sep}", ""))
    texts = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    return replace(outcome, warnings=tuple(texts))


def _prepare_case(job: _Job) -> _Outcome:
    sources = file_hashes(source_files(job.case), job.root)
    recipe = _recipe(job)
    if not job.overwrite:
        finished = _finished(job.folder)
        if finished and (finished["recipe"], finished["sources"]) == (recipe, sources):
            return _Outcome(finished, skipped=True)
    dataset, case = job.dataset, job.case
    scan = dataset.read(case)
    classes = dataset.classes_of({label for labels in scan.names for label in labels})
    harmonised = harmonise(scan, classes, case.annotated, case.unknown, job.settings)
    about = {
        "dataset": case.dataset,
        "id": case.id,
        "sources": sources,
        "licence": case.licence or dataset.licence,
        "weight": case.weight,
        "split": case.split,
        "recipe": recipe,
    }
    with replacing_folder(job.folder) as temporary:
        return _Outcome(write_case(temporary, harmonised, about))


def _recipe(job: _Job) -> str:
    """A hash of everything besides the sources that the result depends on."""
    dataset, case = job.dataset, job.case
    parts = {
        "versions": [FORMAT_VERSION, RECIPE_VERSION],
        "settings": asdict(job.settings),
        "label_map": sorted((str(key), list(names)) for key, names in dataset.label_map.items()),
        "annotated": list(case.annotated),
        "unknown": list(case.unknown),
        "about": [case.licence or dataset.licence, case.weight, case.split],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _finished(folder: Path) -> dict[str, Any] | None:
    """The description of a case that is whole, and whose files have their sums; or None."""
    try:
        about = read_description(folder)
        for name, sha256 in about.get(FILES, {}).items():
            check_file(folder / name, sha256, again=True)
    except UniversalCTError:
        return None
    files = [CASE, LABELS, CENTRES] + [CT] * bool(about.get("has_ct"))
    whole = {"recipe", "sources"} <= about.keys() and all((folder / f).is_file() for f in files)
    return about if whole else None
