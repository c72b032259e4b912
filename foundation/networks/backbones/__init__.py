"""Backbones, one a file. To add one, write its class into a new file here, or register your own.

MONAI is imported by the backbones that need it, when they are built: it takes several seconds, and
the embedded model does without.
"""

from importlib import import_module
from pkgutil import iter_modules

from foundation.networks.backbones.base import (
    BACKBONES,
    BUILDING,
    Backbone,
    build_backbone,
    register_backbone,
)

__all__ = ["BACKBONES", "BUILDING", "Backbone", "build_backbone", "register_backbone"]

for _module in iter_modules(__path__):  # each registers its backbone
    import_module(f"{__name__}.{_module.name}")
