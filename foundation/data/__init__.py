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
    from foundation.data.layouts import Patterns
    from foundation.data.naming import NewClass
    from foundation.data.reading import read_names
    from foundation.data.store.arrays import Store, StoredCase
    from foundation.data.store.harmonise import Harmonised, harmonise
    from foundation.data.store.manifest import ManifestWriter
    from foundation.data.store.prepare import prepare
    from foundation.data.store.writing import write_case

_HOMES = {
    "cases": "Case DatasetWarning Scan",
    "catalogue": "get_dataset paper_datasets",
    "check": "Report check_dataset",
    "dataset": "Dataset",
    "layouts": "Patterns",
    "naming": "NewClass",
    "reading": "read_names",
    "store.arrays": "Store StoredCase",
    "store.harmonise": "Harmonised harmonise",
    "store.manifest": "ManifestWriter",
    "store.prepare": "prepare",
    "store.writing": "write_case",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Case",
    "Dataset",
    "DatasetWarning",
    "Harmonised",
    "ManifestWriter",
    "NewClass",
    "Patterns",
    "Report",
    "Scan",
    "Store",
    "StoredCase",
    "check_dataset",
    "get_dataset",
    "harmonise",
    "paper_datasets",
    "prepare",
    "read_names",
    "write_case",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
