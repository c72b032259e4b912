"""A CT in, its segmentation out; one or a folder of them."""

import lazy_loader

# Names load on first use, so that reading the options imports no torch: see `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
