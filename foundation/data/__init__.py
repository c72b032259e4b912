"""Datasets: finding and reading labelled scans, the paper's and your own.

    paper/*.yaml, description, catalogue, hooks   what a dataset is, and which there are
    dataset, layouts, table, nnunet, cases        how its cases are found
    reading, dicom                                how a case is read
    meaning, check                                what labels mean; what is wrong with a folder
    naming, finding                               few scans for fine-tuning, in any layout
    store/                                        cases prepared for training

Names load on first use (PEP 562), so that listing the command line imports no numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foundation.data.cases import Case, DatasetWarning, Scan
    from foundation.data.catalogue import get_dataset, paper_datasets
    from foundation.data.check import Report, check_dataset
    from foundation.data.dataset import Dataset

_HOME_OF = {
    "Case": "cases",
    "Dataset": "dataset",
    "DatasetWarning": "cases",
    "Report": "check",
    "Scan": "cases",
    "check_dataset": "check",
    "get_dataset": "catalogue",
    "paper_datasets": "catalogue",
}

__all__ = [
    "Case",
    "Dataset",
    "DatasetWarning",
    "Report",
    "Scan",
    "check_dataset",
    "get_dataset",
    "paper_datasets",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
