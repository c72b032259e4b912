"""Learning rates: of each parameter by name, and their share at each step, by the step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from foundation.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

_FLOOR = 0.05  # of the full rate, at the end of `cosine_to_floor`


@dataclass(frozen=True)
class ScheduleConfig:
    """Which way the learning rate goes.

    Args:
        kind: `cosine` is timm's: a linear warm-up from 0, then half a cosine to 0. `trapezoid`: a
            linear warm-up, a plateau and a linear fall to 0. `cosine_to_floor`: half a cosine over
            all steps, down to a twentieth, times a linear warm-up.
        warm_up: Steps of the linear rise.
        decay: Of the trapezoid, the share of the steps in which it falls.
    """

    kind: Literal["cosine", "trapezoid", "cosine_to_floor"] = "cosine"
    warm_up: int = 0
    decay: float = 0.5

    def __post_init__(self) -> None:
        if self.warm_up < 0:
            raise UsageError(f"warm_up is {self.warm_up}; it is a number of steps.")
        if not 0 <= self.decay <= 1:
            raise UsageError(f"decay is {self.decay}; it is a share in [0, 1].")


@dataclass(frozen=True)
class Schedule:
    """A schedule of so many steps."""

    config: ScheduleConfig
    steps: int

    def share(self, step: int) -> float:
        """Return the share of the full learning rate at `step`, counted from 0."""
        warm_up = self.config.warm_up
        if self.config.kind == "cosine" and step < warm_up:
            return step / warm_up
        rise = min(1.0, (step + 1) / max(1, warm_up))
        if self.config.kind == "trapezoid":
            return min(rise, self.decline(step))
        if self.config.kind == "cosine_to_floor":
            return rise * self.decline(step)
        return self.decline(step)

    def decline(self, step: int) -> float:
        """Return 1 until the rate falls, then the share that is left: what else falls with it."""
        warm_up = self.config.warm_up
        if self.config.kind == "trapezoid":
            falling = max(1, round(self.config.decay * self.steps))
            return min(1.0, (self.steps - step) / falling)
        if self.config.kind == "cosine_to_floor":
            return _FLOOR + (1 - _FLOOR) * _half_cosine(step, self.steps)
        if step < warm_up:
            return 1.0
        return _half_cosine(step - warm_up, self.steps - warm_up)

    def apply(self, optimizer: torch.optim.Optimizer, step: int, factor: float = 1.0) -> None:
        """Set the rates of an optimiser whose groups hold their full rate in `initial_lr`.

        Args:
            optimizer: Its groups get a new `lr`.
            step: Counted from 0.
            factor: The rates are multiplied by it, too.
        """
        share = self.share(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share * factor


def build_adamw(module: nn.Module, rates: Mapping[str, float], **options: Any) -> torch.optim.AdamW:
    """Make AdamW with a group for each learning rate that occurs.

    Args:
        module: What is trained.
        rates: The full learning rate of each parameter that is trained, by name.
        options: Of `torch.optim.AdamW`.

    Returns:
        The optimiser; its groups hold their full rate in `initial_lr`, too.
    """
    import torch

    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if name in rates:
            by_rate.setdefault(rates[name], []).append(parameter)
    groups = [{"params": found, "lr": rate, "initial_lr": rate} for rate, found in by_rate.items()]
    return torch.optim.AdamW(groups, **options)


def _half_cosine(step: int, steps: int) -> float:
    """1 at step 0, 0 at `steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
