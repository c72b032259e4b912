"""head: the network stays as it is, and the new classes get something small of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foundation.tuning.methods.base import Method

if TYPE_CHECKING:
    from foundation.model import UniversalModel
    from foundation.tuning.feeds import Feed
    from foundation.tuning.run import TuningRun


@dataclass(frozen=True, kw_only=True)
class Head(Method):
    """New classes get a branch: a small decoder beside the network's own, and a text-driven head.

    Nothing else is trained, so that the old classes stay the same, bit for bit, and the network
    has to see each window only once: a step computes the branch alone, from cached features. A
    class that the model has gets a branch that computes it in the place of the head.
    """

    name: ClassVar[str] = "head"
    summary: ClassVar[str] = "the network stays: minutes on a CPU; old classes cannot change"
    replaces_known: ClassVar[bool] = True

    learning_rate: float = 5e-3
    steps: int = 480
    validate_every: int = 60

    def rates(self, model: UniversalModel) -> dict[str, float]:
        """As `Method.rates`: the new classes' branch."""
        from foundation.adapting.low_rank import has_adapters

        # With an adapter the branch's head is one too: the rest of it is not stored.
        adapted = has_adapters(model)
        return {
            name: self.learning_rate
            for name, tensor in model.named_parameters()
            if name.startswith("branches.") and (tensor.requires_grad or not adapted)
        }

    def feed(self, run: TuningRun) -> Feed:
        """As `Method.feed`: cached features."""
        from foundation.tuning.feeds import CachedFeed

        return CachedFeed(run, self)
