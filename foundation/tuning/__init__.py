"""Tuning: new classes, known classes or other tasks from a few labelled scans."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foundation.tuning.data import Split, TuningData, read_data
    from foundation.tuning.feeds import CachedFeed, PatchFeed
    from foundation.tuning.methods import (
        METHODS,
        Continual,
        Full,
        Head,
        Lora,
        Method,
        NetworkMethod,
        get_method,
    )
    from foundation.tuning.recipe import Given, method_settings, settings_of
    from foundation.tuning.result import Tuned
    from foundation.tuning.run import AFTER, BEFORE, TuningRun, validation_curve

# Loaded on first use: the command line lists the methods without torch.
_HOMES = {
    "data": "Split TuningData read_data",
    "feeds": "CachedFeed PatchFeed",
    "methods": "METHODS Continual Full Head Lora Method NetworkMethod get_method",
    "recipe": "Given method_settings settings_of",
    "result": "Tuned",
    "run": "AFTER BEFORE TuningRun validation_curve",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AFTER",
    "BEFORE",
    "METHODS",
    "CachedFeed",
    "Continual",
    "Full",
    "Given",
    "Head",
    "Lora",
    "Method",
    "NetworkMethod",
    "PatchFeed",
    "Split",
    "Tuned",
    "TuningData",
    "TuningRun",
    "get_method",
    "method_settings",
    "read_data",
    "settings_of",
    "validation_curve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
