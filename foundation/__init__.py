"""universal-ct: one text-driven model for 25 organs and 6 kinds of tumour in CT.

Names load on first use (PEP 562), so that `universal-ct --help` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from foundation.adapting.classes import add_class
    from foundation.config import ClassSpec, ModelConfig, Preprocessing, TextSpec
    from foundation.data.naming import NewClass
    from foundation.errors import (
        HubError,
        MissingExtraError,
        UniversalCTError,
        UsageError,
        VolumeError,
        WeightsError,
    )
    from foundation.hub.cards import Card, ModelSummary, list_models
    from foundation.hub.load import from_pretrained, model_card, segment
    from foundation.hub.saved import save_pretrained
    from foundation.hub.upload import push_to_hub
    from foundation.imaging.result import Segmentation
    from foundation.model import PlainModel, UniversalModel
    from foundation.networks.encoder import Encoder
    from foundation.taxonomy import CLASSES, AnatomicalClass
    from foundation.tuning.finetune import finetune
    from foundation.tuning.result import Tuned

_HOMES = {
    "hub.cards": ("Card", "ModelSummary", "list_models"),
    "config": ("ClassSpec", "ModelConfig", "Preprocessing", "TextSpec"),
    "errors": (
        "HubError",
        "MissingExtraError",
        "UniversalCTError",
        "UsageError",
        "VolumeError",
        "WeightsError",
    ),
    "hub.load": ("from_pretrained", "model_card", "segment"),
    "hub.saved": ("save_pretrained",),
    "hub.upload": ("push_to_hub",),
    "model": ("PlainModel", "UniversalModel"),
    "networks.encoder": ("Encoder",),
    "adapting.classes": ("add_class",),
    "tuning.finetune": ("finetune",),
    "tuning.result": ("Tuned",),
    "data.naming": ("NewClass",),
    "imaging.result": ("Segmentation",),
    "taxonomy": ("CLASSES", "AnatomicalClass"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CLASSES",
    "AnatomicalClass",
    "Card",
    "ClassSpec",
    "Encoder",
    "HubError",
    "MissingExtraError",
    "ModelConfig",
    "ModelSummary",
    "NewClass",
    "PlainModel",
    "Preprocessing",
    "Segmentation",
    "TextSpec",
    "Tuned",
    "UniversalCTError",
    "UniversalModel",
    "UsageError",
    "VolumeError",
    "WeightsError",
    "add_class",
    "finetune",
    "from_pretrained",
    "list_models",
    "model_card",
    "push_to_hub",
    "save_pretrained",
    "segment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
