"""Modules of `benchmarks/` for tests: they import each other as scripts do."""

import sys
from importlib import import_module
from types import ModuleType

from conftest import REPOSITORY


def script(name: str) -> ModuleType:
    """Import a script without running it."""
    folder = str(REPOSITORY / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return import_module(name)
    finally:
        sys.path.remove(folder)
