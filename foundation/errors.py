"""Errors that a user can act on: each says what was given, what is allowed and what to do."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any


class UniversalCTError(Exception):
    """Base of every error this package raises on purpose. The command line exits with 1."""


class UsageError(UniversalCTError, ValueError):
    """The request itself is wrong (unknown class, bad option). The command line exits with 2."""


class VolumeError(UniversalCTError, ValueError):
    """A CT cannot be read, or is not what it must be."""


class WeightsError(UniversalCTError):
    """Weights are missing, damaged, or do not fit the model; names the keys and why."""


class HubError(UniversalCTError):
    """A model cannot be found, reached or accessed on the hub."""


class MissingExtraError(UniversalCTError, ImportError):
    """An optional dependency is not installed; names the extra that brings it."""


def import_extra(name: str, extra: str, purpose: str) -> Any:
    """Import a module that only an extra installs.

    Args:
        name: The module, such as "peft".
        extra: The extra of this package that installs it.
        purpose: What needs it, as the subject of a sentence: "Adapters need".

    Returns:
        The module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise MissingExtraError(
            f"{purpose} {package}, which is not installed: pip install 'universal-ct[{extra}]'"
        ) from error


def listed(names: Sequence[str], most: int = 8) -> str:
    """Word a list of names for an error's text.

    Args:
        names: The names.
        most: How many are given.

    Returns:
        The first of them, and how many more there are.
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def printable(text: str) -> str:
    """Make text of a file that may come from anybody safe to print.

    Control characters could colour a terminal, move its cursor or change its title, and those that
    turn the direction of writing could show another text than there is.

    Args:
        text: Any text.

    Returns:
        The text; what is neither printable, a line break nor a tab is written as `\\x1b` is here.
    """
    return "".join(
        sign if sign.isprintable() or sign in "\n\t" else sign.encode("unicode_escape").decode()
        for sign in text
    )
