"""continual: everything is trained, and the old model's masks label the old classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from foundation.tuning.methods.base import NetworkMethod, Protection

if TYPE_CHECKING:
    from foundation.tuning.run import TuningRun
    from foundation.tuning.samples import FewScans


@dataclass(frozen=True, kw_only=True)
class Continual(NetworkMethod):
    """The old model segments the training scans once, where they do not label its classes.

    Reference: Zhang et al., MICCAI 2023 (arXiv 2306.00988). Deviation: the old classes keep their
    common head.
    """

    name: ClassVar[str] = "continual"
    summary: ClassVar[str] = "everything is trained; the old model's masks label the old classes"

    protect: Protection = "mask"
    backbone_rate: float = 0.015  # at 0.025 the old classes lost 0.012 in 150 steps

    def scans(self, run: TuningRun) -> FewScans:
        """As `NetworkMethod.scans`: with the old model's masks."""
        from foundation.tuning.samples import pseudo_labels

        old = run.base.to(run.device).eval()
        pseudo = pseudo_labels(old, run.data.train, old.classes, run.shows_bars)
        return replace(super().scans(run), pseudo=pseudo)
