"""The running average of the weights, which is what a run publishes."""

from __future__ import annotations

import torch
from torch import nn


class Average:
    """An exponential running average of a module's state, with a short memory at first.

    Attributes:
        values: The averaged tensors by name; integers are copied.

    Args:
        module: Whose state is averaged.
        decay: Largest share of the past.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the state of `module` after optimiser step `step`, counted from 0."""
        # With its full memory from the start, the random weights would linger in the average.
        decay = min(self.decay, (step + 1) / (step + 10))
        for name, value in module.state_dict().items():
            average = self.values[name]
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)
