"""Models in memory: a backbone and a head, composed, with methods for what users do with them."""

from foundation.model.base import Model
from foundation.model.build import (
    build_model,
    check_finite,
    check_state,
    check_types,
    fill,
    shapes_of,
    weights_of,
    without_memory,
)
from foundation.model.plain import PlainModel
from foundation.model.universal import PROMPTS, UniversalModel

__all__ = [
    "PROMPTS",
    "Model",
    "PlainModel",
    "UniversalModel",
    "build_model",
    "check_finite",
    "check_state",
    "check_types",
    "fill",
    "shapes_of",
    "weights_of",
    "without_memory",
]
