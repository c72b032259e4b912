"""What a recipe needs beside its method: settings from the command line, scans, the report."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, TypeVar, get_args, get_type_hints

from foundation.adapting.adapters import base_sha256
from foundation.adapting.classes import Expectation
from foundation.errors import UniversalCTError, UsageError
from foundation.evaluation.agreement import agreement
from foundation.evaluation.charts import Curve
from foundation.evaluation.report import Report, write_report
from foundation.evaluation.scores import Scores
from foundation.model import UniversalModel
from foundation.synthesis import SMOKE_CLASS, write_scans
from foundation.tuning.data import TuningData

_POSITIONAL = ("data", "classes")
_T = TypeVar("_T")


@contextmanager
def settings_of(
    settings: type[_T],
    doc: str | None,
    given: Sequence[str] | None = None,
    *,
    smoke: Mapping[str, Any],
) -> Iterator[_T]:
    """The settings of a recipe, a dataclass, from its command line.

    The fields `data` and `classes`, where there are any, are positional; each other one is an
    option, `output` also -o. `--smoke` puts generated scans, one class of theirs and a temporary
    output folder in their place, and takes the values of `smoke`; what is given by an option counts
    all the same. The scans are gone after the `with`, within which an error of ours ends the
    program with what it says. doc: the recipe's docstring, shown by --help. given: the command
    line; the program's own if not given.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hints = get_type_hints(settings)
    known: dict[str, Field[Any]] = {each.name: each for each in fields(settings)}  # type: ignore[arg-type]
    for name, each in known.items():
        _add(parser, name, hints[name], None if each.default is MISSING else each.default)
    text = "a few steps on generated data, to see that everything works"
    parser.add_argument("--smoke", action="store_true", help=text)
    values = vars(parser.parse_intermixed_args(given))
    smokes = values.pop("smoke")
    chosen = {name: value for name, value in values.items() if value not in (None, [])}
    if "classes" in chosen:
        chosen["classes"] = tuple(chosen["classes"])
    with tempfile.TemporaryDirectory() as folder:
        if smokes:
            own = {**_generated(Path(folder), known), **smoke}
            chosen = {**own, **chosen}
        missing = [n for n, f in known.items() if f.default is MISSING and n not in chosen]
        if missing:
            parser.error(f"give {', '.join(missing)}, or --smoke to try it on generated scans")
        try:
            yield settings(**chosen)
        except UniversalCTError as error:  # a mistake of the user's, which needs no traceback
            parser.exit(2 if isinstance(error, UsageError) else 1, f"error: {error}\n")


def _add(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any) -> None:
    if name in _POSITIONAL:
        many = name == "classes"
        kind: Any = str if many else Path
        parser.add_argument(name, nargs="*" if many else "?", type=kind, metavar=name.upper())
        return
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    option = "--" + name.replace("_", "-")
    flags = ["-o", option] if name == "output" else [option]
    text = None if default is None else f"(default: {default})"
    parser.add_argument(*flags, type=kinds[0], metavar=kinds[0].__name__.upper(), help=text)


def _generated(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the place of the data, the classes and the output."""
    found: dict[str, Any] = {}
    if "data" in known:
        found["data"] = write_scans(folder / "scans", 3)
        found["classes"] = (SMOKE_CLASS,)
    if "output" in known:
        found["output"] = folder / "run"
    return found


class Written(Protocol):
    """Settings of a recipe that writes results."""

    @property
    def output(self) -> Path:
        """Folder of the run."""


def write_results(
    method: str,
    settings: Written,
    base: UniversalModel,
    data: TuningData,
    before: Scores,
    after: Scores,
    curve: Sequence[tuple[float, float]],
    expected: Sequence[Expectation],
) -> Path:
    """Write report.html and report.csv into the run's folder, and say in short what they say.

    before, after: of new and old classes; `evaluate` kept the masks of both in masks/before and
    masks/after of the run's folder. curve: step and validation Dice. expected: see `add_classes`.
    """
    measured, masks = data.test or data.validation, settings.output / "masks"
    agreed = agreement(
        masks / "before", masks / "after", measured, base.classes, after.tolerance_mm
    )
    for kind, names in (("new", data.names), ("old", base.classes)):
        if (dice := after.mean(names)) is not None:
            print(
                f"{kind} classes: Dice {before.mean(names) or 0:.3f} → {dice:.3f}", file=sys.stderr
            )
    if (same := agreed.mean(agreed.classes)) is not None:
        text = "old classes that the scans do not label: Dice agreement with the model before"
        print(f"{text} {same:.3f}", file=sys.stderr)
    report = Report(
        title=f"{', '.join(data.names)}: {method}",
        lineage={
            "base model": base.config.name,
            "SHA-256 of its weights, in half precision": base_sha256(base),
            "data": f"{data.layout}, SHA-256 {data.digest}",
            "recipe": f"{method}, {settings}",
        },
        new=data.names,
        old=base.classes,
        before=before,
        after=after,
        agreement=agreed,
        measured_on="test scans" if data.test else "validation scans",
        training=(Curve("validation Dice", tuple(curve)),),
        cases=measured,
        masks=masks / "after",
        notes=(*data.notes, *(each.note for each in expected)),
    )
    page = write_report(settings.output, report)
    print(f"report: {page}", file=sys.stderr)
    return page
