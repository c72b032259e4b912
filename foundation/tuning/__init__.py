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
    from foundation.tuning.start import HEADS, random_model, transfer_model, transfer_preprocessing
    from foundation.tuning.tasks import (
        PUBLISHED,
        SIZES,
        TASKS,
        fewshot_subsets,
        get_task,
        read_meta,
        write_subsets,
    )
    from foundation.tuning.transfer import TransferSettings, build_transfer, transfer_method

# Loaded on first use: the command line lists the methods without torch.
_HOMES = {
    "data": "Split TuningData read_data",
    "feeds": "CachedFeed PatchFeed",
    "methods": "METHODS Continual Full Head Lora Method NetworkMethod get_method",
    "recipe": "Given method_settings settings_of",
    "result": "Tuned",
    "run": "AFTER BEFORE TuningRun validation_curve",
    "start": "HEADS random_model transfer_model transfer_preprocessing",
    "tasks": "PUBLISHED SIZES TASKS fewshot_subsets get_task read_meta write_subsets",
    "transfer": "TransferSettings build_transfer transfer_method",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AFTER",
    "BEFORE",
    "HEADS",
    "METHODS",
    "PUBLISHED",
    "SIZES",
    "TASKS",
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
    "TransferSettings",
    "Tuned",
    "TuningData",
    "TuningRun",
    "build_transfer",
    "fewshot_subsets",
    "get_method",
    "get_task",
    "method_settings",
    "random_model",
    "read_data",
    "read_meta",
    "settings_of",
    "transfer_method",
    "transfer_model",
    "transfer_preprocessing",
    "validation_curve",
    "write_subsets",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
