"""Datasets: finding and reading labelled scans, the paper's and your own.

    paper/*.yaml, description, catalogue, hooks   what a dataset is, and which there are
    dataset, layouts, table, nnunet, cases        how its cases are found
    reading, dicom                                how a case is read
    meaning, check                                what labels mean; what is wrong with a folder
    naming, finding                               few scans for fine-tuning, in any layout
    store/                                        cases prepared for training

Names load on first use (PEP 562), so that listing the command line imports no numpy.
"""

import lazy_loader

# Names load on first use, so that listing the command line imports no torch: see `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
