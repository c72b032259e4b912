"""The training core that pretraining and tuning share."""

import lazy_loader

# Names load on first use, so that listing the command line imports no torch: see `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
