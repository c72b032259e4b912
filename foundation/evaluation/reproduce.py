"""The numbers of a model's card, run again.

First the hashes: every file that a record names, data and weights, must be what it was. Then the
measurement runs in this process, and each figure is compared. A kind of measurement that can run
here is registered by the name of its benchmark:

    @measurement("agreement")
    def measure(record: Record, model: Model, data: Path) -> tuple[Figure, ...]: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foundation.errors import UsageError
from foundation.evaluation.labelled_ct import measure_ct
from foundation.evaluation.records import Figure, Record, read_records
from foundation.files import path_sha256
from foundation.hub.cards import card_names
from foundation.hub.folder import CARD
from foundation.hub.load import from_pretrained, model_folder, model_records
from foundation.model import Model

TOLERANCE = 1e-4  # of Dice: other processors round otherwise, and a voxel at a border may flip
Status = Literal["reproduced", "moved", "files differ", "not reproducible", "not run"]
Measure = Callable[[Record, Model, Path], tuple[Figure, ...]]
_MEASURES: dict[str, Measure] = {}
# Counted in the labels, without the network: no machine may give another number.
_EXACT = "reference/"


@dataclass(frozen=True)
class Moved:
    """A figure that is not what the record says.

    Attributes:
        name: Of the figure.
        was: In the record; None where it had no value.
        now: Measured here; None where it has no value, or is not there any more.
        within: Whether the difference is within the tolerance.
    """

    name: str
    was: float | None
    now: float | None
    within: bool


@dataclass(frozen=True)
class Reproduction:
    """What became of one record.

    Attributes:
        record: The record.
        status: "reproduced": every figure is there, within the tolerance. "moved": some are not.
            "files differ": a file is missing or changed, and nothing was run. "not reproducible":
            its weights are not those that can be loaded. "not run": no measurement of this kind
            can run here; its command can.
        reasons: Sentences: which files differ, or why nothing was run.
        moved: The figures that differ, those within the tolerance too.
        compared: How many figures were compared.
    """

    record: Record
    status: Status
    reasons: tuple[str, ...] = ()
    moved: tuple[Moved, ...] = ()
    compared: int = 0


def measurement(benchmark: str) -> Callable[[Measure], Measure]:
    """Register a function that runs the records of a benchmark again.

    Args:
        benchmark: Its name in the records.
    """

    def register(measure: Measure) -> Measure:
        _MEASURES[benchmark] = measure
        return measure

    return register


@measurement("agreement")
def measure_agreement(record: Record, model: Model, data: Path) -> tuple[Figure, ...]:
    """Run a record of benchmarks/agreement.py again.

    Args:
        record: Its arm has the paths `ct` and `labels`, relative to `data`, and may have `also`.
        model: The model.
        data: Folder of the data.
    """
    also = renamed(str(record.arm.get("also", "")))
    return measure_ct(model, data / str(record.arm["ct"]), data / str(record.arm["labels"]), also)


def renamed(text: str) -> dict[str, str]:
    """Read names of labels that stand for classes: "lung_nodule=lung_tumor, …".

    Raises:
        UsageError: A part is not of this form.
    """
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    for label, _, name in pairs:
        if not label or not name:
            raise UsageError(f"{text!r} does not say label=class, as in 'lung_nodule=lung_tumor'.")
    return {label.strip(): name.strip() for label, _, name in pairs}


def reproduce(
    name_or_path: str | Path,
    data: str | Path = ".",
    *,
    ignore_hashes: bool = False,
    tolerance: float = TOLERANCE,
) -> Iterator[Reproduction]:
    """Check the files behind the numbers of a card, and run the numbers again.

    Args:
        name_or_path: A name of `list_models()`, a saved folder, the file of a card, or `org/name`.
        data: The folder that holds the data by the names in the records.
        ignore_hashes: Go on with files that were changed. A missing file stops a record still.
        tolerance: By how much a figure may differ, relative to itself where it is above 1.

    Yields:
        What became of each record, in the order of the file.

    Raises:
        UsageError: Nothing was recorded with this model.
        HubError: There is no such model.
    """
    name = _named(name_or_path)
    path = model_records(name)
    records = read_records(path) if path else []
    if not records:
        raise UsageError(
            f"No number was recorded with {name}: there is nothing to run again. Measure first: "
            "python benchmarks/agreement.py CT LABELS -m MODEL --record FILE."
        )
    folder = model_folder(name)
    loaded: list[Model] = []
    for record in records:
        if record.benchmark not in _MEASURES:
            known = ", ".join(_MEASURES)
            reason = f"Only {known} can be run from here. Run: {record.command}"
            yield Reproduction(record, "not run", (reason,))
            continue
        if not record.weights:
            yield Reproduction(record, "not reproducible", (_unpublished(record),))
            continue
        missing, changed = _differing(record, folder, Path(data))
        if missing or (changed and not ignore_hashes):
            yield Reproduction(record, "files differ", (*missing, *changed))
            continue
        if not loaded:
            model = from_pretrained(folder)
            loaded.append(model)
        now = _MEASURES[record.benchmark](record, loaded[0], Path(data))
        yield _compared(record, now, tolerance, changed)


def weights_sha256(model: Model) -> dict[str, str]:
    """Return the SHA-256 of each file that makes up a model, for its records.

    Args:
        model: As `from_pretrained` returned it.

    Raises:
        UsageError: It was not loaded from files.
    """
    path = Path(model.origin.path) if model.origin and model.origin.path else None
    if path is None or not path.exists():
        raise UsageError("This model was not loaded from files, so its weights have no hash.")
    if path.is_file():
        return {path.name: path_sha256(path)}
    files = [*path.glob("*.safetensors"), *path.glob("*config.json")]
    return {file.name: path_sha256(file) for file in sorted(files)}


def _named(given: str | Path) -> str:
    """A name or a folder; the file of a card stands for its model."""
    path = Path(given).expanduser()
    if path.suffix == ".md" and path.is_file():
        return str(path.parent) if path.name == CARD or path.stem not in card_names() else path.stem
    return str(given)


def _unpublished(record: Record) -> str:
    model = record.arm.get("model", "that were measured")
    return (
        f"The weights {model} are not published, and their hash was not recorded. "
        f"Its command was: {record.command}"
    )


def _differing(record: Record, folder: Path, data: Path) -> tuple[list[str], list[str]]:
    """Sentences about files that are missing, and about those that were changed."""
    missing, changed = [], []
    for root, files in ((folder, record.weights), (data, record.data)):
        for name, digest in files.items():
            path = root / name
            if not path.exists():
                where = "" if root == folder else f" Say where it is by --data, now {data}."
                missing.append(f"{path} is missing.{where}")
            elif (now := path_sha256(path)) != digest:
                changed.append(f"{path} was changed: SHA-256 {now}, the record says {digest}.")
    return missing, changed


def _compared(
    record: Record, figures: tuple[Figure, ...], tolerance: float, changed: list[str]
) -> Reproduction:
    now = {figure.name: figure.value for figure in figures}
    moved = []
    for figure in record.figures:
        was, found = figure.value, now.get(figure.name)
        if was == found and figure.name in now:
            continue
        allowed = 1e-9 if figure.name.startswith(_EXACT) else tolerance
        near = was is not None and found is not None and abs(was - found) <= allowed * max(1, was)
        moved.append(Moved(figure.name, was, found, near))
    status: Status = "reproduced" if all(each.within for each in moved) else "moved"
    return Reproduction(record, status, tuple(changed), tuple(moved), len(record.figures))
