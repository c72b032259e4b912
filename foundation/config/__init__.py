"""What travels with the weights: architecture, classes, text encoder and preprocessing.

Everything here is plain data that reads from and writes to `config.json`; nothing imports torch.
"""

from foundation.config.adapter import AdapterConfig
from foundation.config.classes import (
    PROMPT_TEMPLATES,
    BranchKind,
    BranchSpec,
    ClassSpec,
    TextSpec,
    check_class_name,
    make_prompt,
)
from foundation.config.network import (
    Activation,
    ModelConfig,
    NetworkConfig,
    Origin,
    read_config,
)
from foundation.config.preprocessing import Preprocessing, check_overlap

__all__ = [
    "PROMPT_TEMPLATES",
    "Activation",
    "AdapterConfig",
    "BranchKind",
    "BranchSpec",
    "ClassSpec",
    "ModelConfig",
    "NetworkConfig",
    "Origin",
    "Preprocessing",
    "TextSpec",
    "check_class_name",
    "check_overlap",
    "make_prompt",
    "read_config",
]
