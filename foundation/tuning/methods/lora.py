"""lora: low-rank changes all over the network, saved apart from the weights as an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from foundation.tuning.methods.base import NetworkMethod

if TYPE_CHECKING:
    from foundation.hub.new_cards import Results
    from foundation.model import UniversalModel
    from foundation.tuning.run import TuningRun

ADAPTER = "adapter"  # folder of the saved adapter within a run's


@dataclass(frozen=True, kw_only=True)
class Lora(NetworkMethod):
    """Each convolution and linear layer learns a low-rank change beside it.

    With the adapter off the model is the old one, bit for bit. Reference: Hu et al., ICLR 2022
    (arXiv 2106.09685).

    Args:
        rank: Of the changes.
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "an adapter of a few hundred kB; the old model comes back without it"

    width: int = 5  # the file stays below 2 % of the model
    rank: int = 1
    backbone_rate: float = 0.25

    def prepare(self, run: TuningRun) -> None:
        """As `Method.prepare`: add the adapter, then train what is new."""
        from foundation.adapting.adapters import add_adapter, default_name

        name = run.name or default_name(run.learnt)
        add_adapter(run.model, name, rank=self.rank, seed=run.seed)
        super().prepare(run)

    def rates(self, model: UniversalModel) -> dict[str, float]:
        """As `Method.rates`: what `add_adapter` has made trainable."""
        rates = super().rates(model)
        return {n: rates[n] for n, tensor in model.named_parameters() if tensor.requires_grad}

    def save(self, run: TuningRun, results: Results, notes: str) -> Path:
        """As `Method.save`: the adapter alone."""
        from foundation.hub.adapter_files import save_adapter

        return save_adapter(run.model, run.folder / ADAPTER, results=results, notes=notes)
