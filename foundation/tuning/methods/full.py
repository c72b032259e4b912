"""full: everything is trained, what was trained before more slowly than what is new."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foundation.tuning.methods.base import NetworkMethod

if TYPE_CHECKING:
    from foundation.model import UniversalModel


@dataclass(frozen=True, kw_only=True)
class Full(NetworkMethod):
    """The whole network learns, together with what the new classes have of their own.

    Args:
        layer_decay: Each stage of the backbone learns at this times the rate of the one after it.
    """

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "everything is trained; the old model's probabilities keep the rest"

    backbone_rate: float = 0.025
    layer_decay: float = 0.8

    def shares(self, model: UniversalModel) -> Mapping[str, float]:
        """As `NetworkMethod.shares`: by depth."""
        from foundation.training.depth import rate_factors

        channels = len(model.config.preprocessing.hu_windows)
        factors = rate_factors(model.backbone, channels, self.layer_decay)
        return {f"backbone.{name}": factor for name, factor in factors.items()}
