"""A tuning as the shared trainer takes it, and what a resumed one must agree in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foundation.model import UniversalModel
from foundation.taxonomy import NAMES
from foundation.training.losses import EXCLUSIVE
from foundation.training.schedule import Schedule, ScheduleConfig, build_adamw
from foundation.training.trainer import Batch, Trainer, TrainerConfig
from foundation.tuning.data import TuningData
from foundation.tuning.feeds import Feed
from foundation.tuning.methods.base import TuningSettings
from foundation.tuning.objective import Forward

if TYPE_CHECKING:
    from accelerate import Accelerator

_CLIP_NORM = 5.0


@dataclass
class TuningTask:
    """A tuning as the trainer takes it; see `training.trainer.Task`.

    Args:
        model: What is trained.
        settings: The numbers of the tuning.
        feed: Gives batches and validation.
        rates: The learning rate of each parameter that is trained, by name.
        objective: Terms of the loss of each scan, from logits and balance.
        terms: Their names.
        classes: Names of the classes that are validated.
        identity: What a resumed run must agree in.
    """

    model: Any  # text-driven or with a plain head
    settings: TuningSettings
    feed: Feed
    rates: Mapping[str, float]
    objective: Callable[[Forward, float], dict[str, Tensor]]
    terms: Sequence[str]
    classes: Sequence[str]
    identity: Mapping[str, object]
    sources: Sequence[str] = ()

    def trainer(
        self, accelerator: Accelerator, folder: Path, *, seed: int, progress: bool
    ) -> Trainer:
        """Return what trains it, with its state in `folder`."""
        settings = self.settings
        config = TrainerConfig(
            steps=settings.steps,
            seed=seed,
            clip_norm=_CLIP_NORM,
            save_every=settings.save_every,
            validate_every=settings.validate_every,
            patience=settings.patience,
            restores_best=True,
            title=settings.name,
        )
        return Trainer(self, config, accelerator, folder, progress=progress)

    @cached_property
    def schedule(self) -> Schedule:
        """As `Task.schedule`."""
        config = ScheduleConfig("cosine_to_floor", self.settings.warm_up)
        return Schedule(config, self.settings.steps)

    @property
    def published(self) -> nn.Module:
        """As `Task.published`."""
        module: nn.Module = self.model
        return module

    @property
    def network(self) -> nn.Module:
        """As `Task.network`."""
        return self.feed.network

    def optimizer(self) -> torch.optim.Optimizer:
        """As `Task.optimizer`: a group for each learning rate."""
        return build_adamw(self.model, self.rates, weight_decay=self.settings.weight_decay)

    def factor(self, step: int) -> float:
        """As `Task.factor`."""
        return 1.0

    def batches(self, first_step: int, rank: int, processes: int) -> Iterator[list[Batch]]:
        """As `Task.batches`; all processes take consecutive samples, as one would of more."""
        size, several = self.settings.batch_size, self.settings.accumulation
        for step in range(first_step, self.settings.steps):
            firsts = [
                ((step * several + place) * processes + rank) * size for place in range(several)
            ]
            yield [self.feed.batch(range(first, first + size)) for first in firsts]

    def losses(
        self, forward: Callable[..., Any], batch: Batch, step: int, accelerator: Accelerator
    ) -> dict[str, Tensor]:
        """As `Task.losses`; the balance between classes falls with the learning rate."""
        balance = self.settings.balance * self.schedule.share(step)
        return self.objective(self.feed.forward(forward, batch, accelerator), balance)

    def validate(self, trainer: Trainer) -> Mapping[str, Tensor]:
        """As `Task.validate`."""
        accelerator = trainer.accelerator
        return self.feed.validate(accelerator.process_index, accelerator.num_processes)

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """As `Task.scores`."""
        return self.feed.scores(sums)

    def improved(self, trainer: Trainer) -> None:
        """As `Task.improved`: the trainer keeps the best weights."""


def exclusive_classes(
    classes: Sequence[str], model: UniversalModel, added: Sequence[str]
) -> Tensor:
    """Return of which classes a voxel has at most one, bool (K,): organs, and new ones like them.

    Args:
        classes: Names, in the order of the result.
        model: Has them all.
        added: Those that are new; without a parent they count as organs.
    """
    known = dict(zip(NAMES, EXCLUSIVE.tolist(), strict=True))
    parents = {spec.name: spec.parent for spec in model.config.classes}
    return torch.tensor(
        [parents[name] is None if name in added else known.get(name, False) for name in classes]
    )


def identity(
    base: nn.Module,
    data: TuningData,
    learnt: Sequence[str],
    settings: TuningSettings,
    seed: int,
) -> dict[str, object]:
    """Return what a resumed tuning must agree in, as JSON gives it back."""
    numbers = {"name": settings.name, **asdict(settings)}
    for free in ("save_every", "patience"):
        numbers.pop(free)
    state = hashlib.sha256()
    for name, value in sorted(base.state_dict().items()):
        if isinstance(value, Tensor):
            state.update(name.encode())
            state.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    found = {
        "model": state.hexdigest(),
        "data": data.digest,
        "classes": list(learnt),
        "method": numbers,
        "seed": seed,
    }
    plain: dict[str, object] = json.loads(json.dumps(found))
    return plain
