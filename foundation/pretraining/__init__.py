"""Pretraining: anatomies and scans in, weights out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foundation.pretraining.config import RunConfig
    from foundation.pretraining.folds import Folds, make_folds, read_folds
    from foundation.pretraining.reading import load_config, with_store
    from foundation.pretraining.run import Pretraining, pretrain

# Loaded on first use: the command line reads a configuration without torch.
_HOMES = {
    "config": "RunConfig",
    "folds": "Folds make_folds read_folds",
    "reading": "load_config with_store",
    "run": "Pretraining pretrain",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Folds",
    "Pretraining",
    "RunConfig",
    "load_config",
    "make_folds",
    "pretrain",
    "read_folds",
    "with_store",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
