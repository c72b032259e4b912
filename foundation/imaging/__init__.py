"""A CT and its segmentation: files, frames, results, pictures."""

import lazy_loader

# Names load on first use, so that listing the command line imports no numpy: see `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
