"""What the methods of adapting a model share: their common settings, and how they are used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from foundation.errors import UsageError

if TYPE_CHECKING:
    from foundation.hub.new_cards import Results
    from foundation.model import UniversalModel
    from foundation.tuning.feeds import Feed
    from foundation.tuning.run import TuningRun
    from foundation.tuning.samples import FewScans

Protection = Literal["distil", "mask", "nothing"]
MODEL = "model"  # folder of the saved model within a run's


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """The numbers of a tuning, whatever it trains.

    Args:
        steps: Optimiser steps, at most.
        batch_size: Patches of one process in a batch.
        accumulation: Batches of a step.
        validate_every: Steps between validations.
        patience: Validations without a gain, after which the training ends.
        learning_rate: Of what is new.
        weight_decay: Of AdamW.
        warm_up: Steps in which the learning rate rises.
        balance: How far the loss raises small classes, see `scan_losses`.
        width: Channels of the new classes' small decoder.
        voxels: Of a patch, that the loss looks at.
        windows: Most windows of all scans whose features are cached.
        precision: Of the network's computation; `auto`: bfloat16 where that is fast and right.
        save_every: Steps between checkpoints.
    """

    name: ClassVar[str]

    steps: int = 150
    batch_size: int = 1
    accumulation: int = 1
    validate_every: int = 50
    patience: int = 3
    learning_rate: float = 2e-3
    weight_decay: float = 1e-5
    warm_up: int = 10
    balance: float = 0.5
    width: int = 24
    voxels: int = 32768
    windows: int = 48
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    save_every: int = 25

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "int" and value < (0 if each.name in ("warm_up", "probe") else 1):
                raise UsageError(f"{each.name} is {value}; it must be 1 or more.")
        if self.learning_rate <= 0:
            raise UsageError(f"learning_rate is {self.learning_rate}; it must be above 0.")


@dataclass(frozen=True, kw_only=True)
class Method(TuningSettings, ABC):
    """One way of adapting a model: what it trains, from which batches, and how it is saved."""

    summary: ClassVar[str]  # a line for --help
    replaces_known: ClassVar[bool] = False  # a known class gets a branch that computes it instead

    def prepare(self, run: TuningRun) -> None:  # most methods need nothing
        """Change the model before its training, which is given with the new classes."""

    @abstractmethod
    def rates(self, model: UniversalModel) -> dict[str, float]:
        """Return the learning rate of each parameter that is trained, by name."""

    @abstractmethod
    def feed(self, run: TuningRun) -> Feed:
        """Return what gives the batches and the validation."""

    def save(self, run: TuningRun, results: Results, notes: str) -> Path:
        """Write what was trained into the run's folder.

        Args:
            run: Its model is saved.
            results: What was measured, for the card.
            notes: Further sections of the card, Markdown.

        Returns:
            The folder of the model, or of the adapter.
        """
        import torch

        from foundation.hub.saved import base_of, save_pretrained

        run.model.config = replace(run.model.config, name=run.name or run.folder.name)
        return save_pretrained(
            run.model,
            run.folder / MODEL,
            results=results,
            base=base_of(run.base),
            notes=notes,
            dtype=torch.float16,
        )


@dataclass(frozen=True, kw_only=True)
class NetworkMethod(Method):
    """A method that trains the network, or what changes it, on patches.

    Args:
        probe: Steps before all others, in which only what is new is trained, as by `head`.
        backbone_rate: Share of the learning rate, for what was trained before.
        protect: How old classes that a scan does not label are kept: `distil`, the old model's
            probabilities are their target; `mask`, the loss leaves them out; `nothing`, they count
            as absent, which makes the model forget them.
        distil: Weight of that term.
    """

    probe: int = 360
    backbone_rate: float = 1.0
    protect: Protection = "distil"
    distil: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protect not in ("distil", "mask", "nothing"):
            raise UsageError(f"protect is {self.protect!r}; choose distil, mask or nothing.")

    def prepare(self, run: TuningRun) -> None:
        """As `Method.prepare`: train what is new alone."""
        run.train_new(self.probe, self)

    def rates(self, model: UniversalModel) -> dict[str, float]:
        """As `Method.rates`: everything, what was trained before more slowly."""
        shares = self.shares(model)
        return {
            name: self.learning_rate
            if name.startswith("branches.")
            else self.learning_rate * (self.backbone_rate * shares.get(name, 1.0))
            for name, _ in model.named_parameters()
        }

    def shares(self, model: UniversalModel) -> Mapping[str, float]:
        """Return what a parameter's rate is multiplied by, by name; 1 for all others."""
        return {}

    def scans(self, run: TuningRun) -> FewScans:
        """Return the training scans, from which patches are drawn."""
        from foundation.tuning.samples import FewScans

        absent = run.old if self.protect == "nothing" else ()
        return FewScans(run.data.train, run.learnt, absent=absent)

    def feed(self, run: TuningRun) -> Feed:
        """As `Method.feed`: patches, and the old model where it teaches."""
        from foundation.tuning.feeds import PatchFeed

        scans, teacher = self.scans(run), run.base if self.protect == "distil" else None
        return PatchFeed(
            self, run.model, scans, run.data.validation, seed=run.seed, teacher=teacher
        )
