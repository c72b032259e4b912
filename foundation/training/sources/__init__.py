"""Sources of training samples, one file a kind: the entry of a configuration, and what it builds.

A new kind is one file with a dataclass that `register_source` decorates; import it here.
"""

from foundation.training.sources.base import (
    SOURCES,
    Source,
    SourceConfig,
    SourceData,
    register_source,
)
from foundation.training.sources.phantoms import PhantomsConfig
from foundation.training.sources.scans import ScansConfig
from foundation.training.sources.synthesis import SynthesisConfig

__all__ = [
    "SOURCES",
    "PhantomsConfig",
    "ScansConfig",
    "Source",
    "SourceConfig",
    "SourceData",
    "SynthesisConfig",
    "register_source",
]
