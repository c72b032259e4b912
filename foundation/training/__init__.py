"""The training core that pretraining and tuning share."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foundation.training.ema import Average
    from foundation.training.losses import EXCLUSIVE, masked_loss, published_losses, scan_losses
    from foundation.training.mixture import Mixture
    from foundation.training.sample import PatchGrid, Sample
    from foundation.training.schedule import Schedule, ScheduleConfig
    from foundation.training.trainer import Task, Trainer, TrainerConfig, accelerator_for

# Loaded on first use: a configuration is read without torch.
_HOMES = {
    "ema": "Average",
    "losses": "EXCLUSIVE masked_loss published_losses scan_losses",
    "mixture": "Mixture",
    "sample": "PatchGrid Sample",
    "schedule": "Schedule ScheduleConfig",
    "trainer": "Task Trainer TrainerConfig accelerator_for",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "EXCLUSIVE",
    "Average",
    "Mixture",
    "PatchGrid",
    "Sample",
    "Schedule",
    "ScheduleConfig",
    "Task",
    "Trainer",
    "TrainerConfig",
    "accelerator_for",
    "masked_loss",
    "published_losses",
    "scan_losses",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
