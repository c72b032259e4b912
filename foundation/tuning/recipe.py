"""The command line of a recipe, made from the dataclasses of its settings."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from foundation.errors import UniversalCTError, UsageError
from foundation.synthesis import SMOKE_CLASS, write_scans
from foundation.tuning.methods import Method
from foundation.tuning.result import Tuned

_POSITIONAL = ("data", "classes")
_TEMPORARY = "universal-ct-smoke-"  # what the folder of `--smoke` begins with
_T = TypeVar("_T")
_M = TypeVar("_M", bound=Method)


@dataclass(frozen=True)
class Given:
    """What every recipe of a method is given.

    Args:
        data: Labelled scans to learn from; see `universal-ct add-class --help`.
        classes: To learn.
        output: Folder of the run.
        test: Scans that are only measured.
        model: To start from.
        device: auto, cpu, cuda, cuda:1 or mps.
        seed: Of splits and training.
        validation: Share of the scans by which the best step is chosen.
    """

    data: Path
    classes: tuple[str, ...]
    output: Path
    test: Path | None = None
    model: str = "universal-ct"
    device: str = "auto"
    seed: int = 1
    validation: float = 0.2

    def show(self, tuned: Tuned) -> None:
        """Print what was reached, and where it lies if that is kept."""
        print(tuned.table(), file=sys.stderr)
        if any(parent.name.startswith(_TEMPORARY) for parent in self.output.parents):
            print("It works. These files were temporary, and are removed.", file=sys.stderr)
        else:
            print(f"Saved to {tuned.saved}; see {tuned.report}.", file=sys.stderr)


@contextmanager
def method_settings(
    method: type[_M], doc: str | None, given: Sequence[str] | None, *, smoke: Mapping[str, Any]
) -> Iterator[tuple[Given, _M]]:
    """Yield what the command line of a method's recipe gives; see `settings_of`.

    Args:
        method: Each of its settings is an option.
        doc: The recipe's docstring, shown by --help.
        given: The command line; the program's own if None.
        smoke: Settings for `--smoke`.
    """
    with _parsed((Given, method), doc, given, smoke) as (common, settings):
        yield common, settings


@contextmanager
def settings_of(
    settings: type[_T],
    doc: str | None,
    given: Sequence[str] | None = None,
    *,
    smoke: Mapping[str, Any],
) -> Iterator[_T]:
    """Yield the settings of a recipe, a dataclass, from its command line.

    The fields `data` and `classes`, where there are any, are operands; each other one is an
    option, `output` also -o. `--smoke` puts generated scans, one class of theirs and a temporary
    output folder in their place, and takes the values of `smoke`; what is given by an option counts
    all the same. The scans are gone after the `with`, within which an error of ours ends the
    program with its message.

    Args:
        settings: The dataclass.
        doc: The recipe's docstring, shown by --help.
        given: The command line; the program's own if None.
        smoke: Settings for `--smoke`.
    """
    with _parsed((settings,), doc, given, smoke) as (found,):
        yield found


@contextmanager
def _parsed(
    kinds: Sequence[type[Any]],
    doc: str | None,
    given: Sequence[str] | None,
    smoke: Mapping[str, Any],
) -> Iterator[list[Any]]:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known: dict[str, Field[Any]] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for each in fields(kind):
            known[each.name] = each
            _add(parser, each.name, hints[each.name], each.default)
    text = "a few steps on generated data, to see that everything works"
    parser.add_argument("--smoke", action="store_true", help=text)
    values = vars(parser.parse_intermixed_args(given))
    smokes = values.pop("smoke")
    chosen = {name: value for name, value in values.items() if value not in (None, [])}
    if "classes" in chosen:
        chosen["classes"] = tuple(chosen["classes"])
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY) as folder:
        if smokes:
            chosen = {**_generated(Path(folder), known), **smoke, **chosen}
        missing = [n for n, f in known.items() if f.default is MISSING and n not in chosen]
        if missing:
            parser.error(f"give {', '.join(missing)}, or --smoke to try it on generated scans")
        try:
            yield [
                kind(**{f.name: chosen[f.name] for f in fields(kind) if f.name in chosen})
                for kind in kinds
            ]
        except UniversalCTError as error:  # a mistake of the user's, which needs no traceback
            parser.exit(2 if isinstance(error, UsageError) else 1, f"error: {error}\n")


def _add(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any) -> None:
    if name in _POSITIONAL:
        many = name == "classes"
        operand: Any = str if many else Path
        parser.add_argument(name, nargs="*" if many else "?", type=operand, metavar=name.upper())
        return
    option = "--" + name.replace("_", "-")
    flags = ["-o", option] if name == "output" else [option]
    text = None if default in (None, MISSING) else f"(default: {default})"
    if get_origin(hint) is Literal:
        parser.add_argument(*flags, choices=get_args(hint), help=text)
        return
    (kind,) = (kind for kind in get_args(hint) or (hint,) if kind is not NoneType)
    parser.add_argument(*flags, type=kind, metavar=kind.__name__.upper(), help=text)


def _generated(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the place of the data, the classes and the output."""
    found: dict[str, Any] = {}
    if "data" in known:
        found["data"] = write_scans(folder / "scans", 3)
        found["classes"] = (SMOKE_CLASS,)
    if "output" in known:
        found["output"] = folder / "run"
    return found
