"""Datasets: finding and reading the labelled scans of the paper, and of one's own.

Names load on first use (PEP 562), so that listing the command line imports no numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foundation.data.cases import Case, DatasetWarning, Scan
    from foundation.data.check import Report, check_dataset
    from foundation.data.dataset import Adapter
    from foundation.data.table import ADAPTERS, get_adapter

_HOME_OF = {
    "ADAPTERS": "table",
    "Adapter": "dataset",
    "get_adapter": "table",
    "Case": "cases",
    "DatasetWarning": "cases",
    "Scan": "cases",
    "Report": "check",
    "check_dataset": "check",
}

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Case",
    "DatasetWarning",
    "Report",
    "Scan",
    "check_dataset",
    "get_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
