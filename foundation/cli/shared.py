"""What the verbs of the command line share: options, messages, tables. Nothing heavy."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from foundation.errors import printable

DEFAULT_MODEL = "universal-ct"
NOTICE = "For research only: not a medical device, not for diagnosis or treatment."


# --- options --------------------------------------------------------------------------------------


def add_verb(verbs: Any, name: str, text: str, more: str | None = None) -> argparse.ArgumentParser:
    """Add a verb with the options that all have.

    Args:
        verbs: What `add_subparsers` returned.
        name: The verb.
        text: What it does, without a full stop.
        more: Text below the options, as it stands.

    Returns:
        The verb's parser.
    """
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=text,
        description=f"{text}.",
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(verb)
    return verb


def add_common(parser: argparse.ArgumentParser, default: Any = False) -> None:
    """Add -q and --debug."""
    add = parser.add_argument
    text = "no progress; results, warnings and errors only"
    add("-q", "--quiet", action="store_true", default=default, help=text)
    add("--debug", action="store_true", default=default, help="tracebacks and all warnings")


def add_json(parser: argparse.ArgumentParser, default: Any = False) -> None:
    """Add --json."""
    text = "the result as JSON on standard output"
    parser.add_argument("--json", action="store_true", default=default, help=text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add -m."""
    text = (
        "a name of `universal-ct models`, a saved folder, a published checkpoint, or "
        "org/name@revision on the Hub (default: %(default)s)"
    )
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, metavar="MODEL", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 or mps")


def split_names(given: Sequence[str]) -> list[str]:
    """Return names that were separated by spaces or commas, one by one."""
    return [name.strip() for each in given for name in each.split(",") if name.strip()]


def intermix(verb: argparse.ArgumentParser) -> None:
    """Let operands also follow options; argparse offers that to whole command lines only."""
    plain = verb.parse_known_args

    def intermixed(args: Any = None, namespace: Any = None) -> Any:
        verb.parse_known_args = plain  # type: ignore[method-assign]  # which it calls itself
        try:
            return verb.parse_known_intermixed_args(args, namespace)
        finally:
            verb.parse_known_args = intermixed  # type: ignore[method-assign]

    verb.parse_known_args = intermixed  # type: ignore[method-assign]


# --- devices --------------------------------------------------------------------------------------


def ready_device(name: str) -> str:
    """Return the device of this name, and make the process ready for it.

    Raises:
        UsageError: There is no such device.
    """
    from foundation.hardware import keep_freed_memory
    from foundation.inference.predict import choose_device

    device = str(choose_device(name))
    if device == "cpu":
        keep_freed_memory()  # a third of the time
    return device


# --- messages -------------------------------------------------------------------------------------


def prints_results() -> bool:
    """Return whether this process prints results: the first of those that torchrun starts."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print to standard error; see `printable` for text of files."""
    print(printable(text), file=sys.stderr, flush=True)


def print_json(content: Any) -> None:
    """Print a result to standard output."""
    print(json.dumps(content, indent=2, default=str))


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Set rows of texts in columns, as wide as their widest text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


@contextmanager
def messages(args: argparse.Namespace) -> Iterator[None]:
    """Show our warnings as plain lines on standard error; those of other libraries with --debug.

    A warning is a doubt about the result: --quiet hides notices, never a warning.
    """
    logger = logging.getLogger("foundation")
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.ERROR if args.quiet else logging.WARNING)
    logger.addHandler(handler)

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if args.debug or category.__module__.startswith("foundation"):
            say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always" if args.debug else "default")
        warnings.showwarning = show
        try:
            yield
        finally:
            logger.removeHandler(handler)
