"""The paper's figure in code: backbones, the text-driven head, and branches of added classes."""

import lazy_loader

# Names load on first use, so that reading a configuration imports no torch: see `__init__.pyi`.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
