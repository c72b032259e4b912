"""The loop of a tuning: steps, validation, early stopping; killed at any moment, it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from foundation.errors import UsageError
from foundation.files import recover_folder
from foundation.training import checkpoints
from foundation.training.checkpoints import Checkpoint
from foundation.training.logs import Table
from foundation.tuning.feeds import Feed
from foundation.tuning.methods import Method
from foundation.tuning.objective import Forward

LAST, LOG, VALIDATION = "last", "log.csv", "validation.csv"
_CLIP_NORM = 5.0


@dataclass(frozen=True)
class Parameters:
    """What is trained, by name, and the learning rate of each."""

    tensors: Mapping[str, nn.Parameter]
    rates: Mapping[str, float]

    def groups(self) -> list[dict[str, object]]:
        """Groups of an optimiser, one a rate."""
        by_rate: dict[float, list[nn.Parameter]] = {}
        for name, tensor in self.tensors.items():
            by_rate.setdefault(self.rates[name], []).append(tensor)
        return [
            {"params": found, "lr": rate, "initial_lr": rate} for rate, found in by_rate.items()
        ]


class Tuner:
    """A tuning in memory. The best state, by mean validation Dice, is what it leaves in the module.

    module: holds `parameters`. feed: gives the forward pass of a step. losses: the terms of its
    loss, whose sum is minimised, at a balance between classes that falls with the learning rate.
    validate: Dice of each new class; called between steps. folder: receives log.csv, validation.csv
    and last/. identity: what a resumed run must agree in.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Parameters,
        feed: Feed,
        losses: Callable[[Forward, float], dict[str, Tensor]],
        method: Method,
        validate: Callable[[], dict[str, float]],
        folder: Path,
        identity: Mapping[str, object],
        *,
        progress: bool = True,
    ) -> None:
        self.module, self.parameters, self.feed = module, parameters, feed
        self.losses, self.method, self.validate = losses, method, validate
        self.folder, self.identity, self.progress = folder, dict(identity), progress
        self.optimizer = torch.optim.AdamW(parameters.groups(), weight_decay=method.weight_decay)
        self.step, self.stale = 0, 0
        self.best: float | None = None
        self.best_step = 0
        self.best_state: dict[str, Tensor] = {}
        self.log: Table | None = None

    def train(self) -> None:
        """Train to the end, from where an interrupted run stopped."""
        self._begin()
        bar = tqdm(
            total=self.method.steps,
            initial=self.step,
            desc=self.method.name,
            unit="step",
            disable=not self.progress,
        )
        with bar:
            while self.step < self.method.steps and self.stale < self.method.patience:
                self._train_step()
                bar.update()
                due = self.step % self.method.validate_every == 0
                if due or self.step == self.method.steps:
                    mean = self._score(self.validate())
                    bar.set_postfix_str(f"validation Dice {mean:.3f}, best {self.best or 0:.3f}")
                if self.step % self.method.save_every == 0 or self.step == self.method.steps:
                    self._save()
        with torch.no_grad():
            for name, value in self.best_state.items():
                self.parameters.tensors[name].copy_(value)

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        recover_folder(self.folder / LAST)
        if (self.folder / LAST).is_dir():
            self._restore(checkpoints.load(self.folder / LAST))
        self.log = Table(self.folder / LOG, ["loss", "dice", "binary", "exclusive", "distil"])
        self.validation_log = Table(self.folder / VALIDATION, ["mean", "classes"])
        done = self.step if self.best_state else -1  # without a checkpoint nothing is done
        self.log.continue_from(done)
        self.validation_log.continue_from(done)
        if not self.best_state:
            self._keep()  # nothing that was learnt may be worse than not having learnt
            self._score(self.validate())

    def _train_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_share(self.step, self.method)
        self.optimizer.zero_grad(set_to_none=True)
        balance = self.method.balance * rate_share(self.step, self.method)
        terms = self.losses(self.feed(self.step), balance)
        loss = torch.stack(list(terms.values())).sum()
        values = {name: float(value.detach()) for name, value in terms.items()}
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(self.parameters.tensors.values()), _CLIP_NORM)
        if not math.isfinite(sum(values.values()) + float(norm)):  # before it is in the weights
            raise UsageError(
                f"The loss is {sum(values.values())} at step {self.step}, the norm of its gradient "
                f"{float(norm)}: lower the learning rate."
            )
        self.optimizer.step()
        self.step += 1
        assert self.log is not None
        if self.step % 10 == 0:
            self.log.append(self.step, {"loss": sum(values.values()), **values})

    def _score(self, found: Mapping[str, float]) -> float:
        mean = sum(found.values()) / len(found) if found else 0.0
        self.validation_log.append(self.step, {"mean": mean, "classes": len(found)})
        if self.best is None or mean > self.best:
            self.best, self.best_step, self.stale = mean, self.step, 0
            self._keep()
        else:
            self.stale += 1
        return mean

    def _keep(self) -> None:
        self.best_state = {
            name: checkpoints.whole(value) for name, value in self.parameters.tensors.items()
        }

    def _save(self) -> None:
        checkpoint = Checkpoint(
            network=checkpoints.gathered(self.parameters.tensors),
            average=self.best_state,  # the best state stands in the place of an average
            optimizer=checkpoints.optimizer_state(self.optimizer, self.module),
            progress={
                "step": self.step,
                "best": self.best,
                "best_step": self.best_step,
                "stale": self.stale,
                "identity": self.identity,
            },
        )
        checkpoints.save(self.folder / LAST, checkpoint)

    def _restore(self, saved: Checkpoint) -> None:
        differing = sorted(
            key
            for key in self.identity.keys() | saved.progress["identity"].keys()
            if self.identity.get(key) != saved.progress["identity"].get(key)
        )
        if differing:
            raise UsageError(
                f"{self.folder} holds a tuning with other settings ({', '.join(differing)} "
                "differ). Use those, or another output folder."
            )
        self.step, self.best = saved.progress["step"], saved.progress["best"]
        self.best_step, self.stale = saved.progress["best_step"], saved.progress["stale"]
        checkpoints.restore(self.parameters.tensors, saved.network, "network")
        self.best_state = dict(saved.average or {})
        checkpoints.restore_optimizer(self.optimizer, self.module, saved.optimizer)


def rate_share(step: int, method: Method) -> float:
    """Share of the full learning rate: a linear rise, then half a cosine down to a twentieth."""
    rise = min(1.0, (step + 1) / max(1, method.warm_up))
    fall = 0.5 * (1 + math.cos(math.pi * step / method.steps))
    return rise * (0.05 + 0.95 * fall)
