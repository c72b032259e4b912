"""The learning rate's way through a run, a function of the step alone."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from foundation.errors import MissingExtraError
from foundation.pretraining.config import ScheduleConfig


class Schedule(Protocol):
    """Sets the learning rates of an optimiser whose groups hold their full one in `initial_lr`."""

    def apply(self, step: int) -> None:
        """Set the rates for step `step`, counted from 0."""

    def decline(self, step: int) -> float:
        """1 until the rate falls, then the share of it that is left: what else falls with it."""


class Trapezoid:
    """Linear warm-up, plateau, and a linear fall to 0 over the last `decay` of the steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps: int):
        self.optimizer, self.config, self.steps = optimizer, config, steps

    def apply(self, step: int) -> None:
        """As `Schedule.apply`."""
        rising = min(1.0, (step + 1) / max(1, self.config.warm_up))
        factor = min(rising, self.decline(step))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def decline(self, step: int) -> float:
        """As `Schedule.decline`."""
        falling = max(1, round(self.config.decay * self.steps))
        return min(1.0, (self.steps - step) / falling)


class Cosine:
    """timm's CosineLRScheduler: linear warm-up from 0, then half a cosine to 0."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps: int):
        try:
            from timm.scheduler.cosine_lr import CosineLRScheduler
        except ImportError as error:
            raise MissingExtraError(
                "The cosine schedule needs timm, which is not installed: "
                "pip install 'universal-ct[train]'"
            ) from error
        self.optimizer, self.warm_up = optimizer, config.warm_up
        self.scheduler: Any = CosineLRScheduler(
            optimizer,
            t_initial=max(1, steps - config.warm_up),
            warmup_t=config.warm_up,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def apply(self, step: int) -> None:
        """As `Schedule.apply`."""
        self.scheduler.step_update(step)

    def decline(self, step: int) -> float:
        """As `Schedule.decline`."""
        if step < self.warm_up:
            return 1.0
        self.apply(step)
        group = self.optimizer.param_groups[0]
        return float(group["lr"] / group["initial_lr"])


def build_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps: int
) -> Schedule:
    """The schedule of a run of `steps`.

    Raises:
        MissingExtraError: the cosine needs timm, which is not installed.
    """
    kinds: dict[str, type[Cosine] | type[Trapezoid]] = {"cosine": Cosine, "trapezoid": Trapezoid}
    return kinds[config.kind](optimizer, config, steps)
