"""What verbs share in how they read a command line."""

from __future__ import annotations

import argparse
import os
from typing import Any


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


def prints_results() -> bool:
    """Return whether this process prints results: the first of those that torchrun starts."""
    return int(os.environ.get("RANK", "0")) == 0
