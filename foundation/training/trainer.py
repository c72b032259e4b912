"""The training loop, shared by pretraining and tuning: one process or many, resumable at any step.

    accelerator = accelerator_for("bfloat16")
    Trainer(task, TrainerConfig(steps=400, seed=1), accelerator, folder).train()

A `Task` says what is trained, on which batches, by which loss and how it is validated. The folder
receives log.csv, validation.csv and last/, from which the same call goes on after an interruption:
bit for bit on one process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from foundation.errors import UsageError, import_extra
from foundation.files import recover_folder
from foundation.hardware import computes_bfloat16
from foundation.training import checkpoints
from foundation.training.checkpoints import Checkpoint
from foundation.training.ema import Average
from foundation.training.logs import Board, Progress, Table, Tally
from foundation.training.schedule import Schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG, VALIDATION, LAST = "log.csv", "validation.csv", "last"
Precision = Literal["float32", "bfloat16", "float16"]
Batch = Mapping[str, Any]
_LONGEST_WAIT = timedelta(hours=12)  # of processes while one prepares or measures scans
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class TrainerConfig:
    """How long a run trains, and what it writes when.

    Args:
        steps: Optimiser steps.
        seed: Of what chance the network itself uses, such as dropout.
        clip_norm: Largest norm of the gradient; None for no limit.
        ema: Decay of the running average of the published weights; None keeps none.
        save_every: Steps between checkpoints.
        log_every: Steps between rows of log.csv.
        validate_every: Steps between validations; 0 for none.
        patience: Validations without a gain, after which the run ends; None for no such end.
        restores_best: Validate before the first step too, and leave the best weights in the
            network at the end.
        tensorboard: Write events for it, too.
        title: Of the progress bar.
        advice: What to do about a loss that is no number.
    """

    steps: int
    seed: int = 1
    clip_norm: float | None = None
    ema: float | None = None
    save_every: int = 500
    log_every: int = 10
    validate_every: int = 0
    patience: int | None = None
    restores_best: bool = False
    tensorboard: bool = False
    title: str = "train"
    advice: str = "lower the learning rate."


class Task(Protocol):
    """What a run trains, on what and against what."""

    @property
    def network(self) -> nn.Module:
        """What is trained, and called for the loss; frozen parameters ask for no gradient."""

    @property
    def published(self) -> nn.Module:
        """The part of `network` whose weights are the result: an average is of these."""

    @property
    def schedule(self) -> Schedule:
        """The way of the learning rate."""

    @property
    def terms(self) -> Sequence[str]:
        """Names of the loss's terms."""

    @property
    def sources(self) -> Sequence[str]:
        """Names that `source` of a batch indexes; none if losses are not told by source."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes that are validated."""

    @property
    def identity(self) -> Mapping[str, object]:
        """What a resumed run must agree in, as JSON gives it back."""

    def optimizer(self) -> torch.optim.Optimizer:
        """Make the optimiser; its groups hold their full learning rate in `initial_lr`."""

    def batches(self, first_step: int, rank: int, processes: int) -> Iterator[Sequence[Batch]]:
        """Yield the batches of each step of one process; several are accumulated."""

    def factor(self, step: int) -> float:
        """Return what the scheduled rate is multiplied by at a step."""

    def losses(
        self, forward: Callable[..., Any], batch: Batch, step: int, accelerator: Accelerator
    ) -> dict[str, Tensor]:
        """Return the weighted terms of each scan's loss, (B,) each; `forward` is the network."""

    def validate(self, trainer: Trainer) -> Mapping[str, Tensor]:
        """Return sums over this process's share of the validation, which `scores` reads."""

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the score of each class that was seen, from the sums of all processes."""

    def improved(self, trainer: Trainer) -> None:
        """Keep what is to be kept of the best weights so far."""


def accelerator_for(
    precision: Precision = "float32", device: str | torch.device | None = None
) -> Accelerator:
    """Return Accelerate's view of this process: its device, its rank, its precision.

    Args:
        precision: Of the network's computation.
        device: Where to train; the first accelerator of this machine if not given. Of several
            processes each takes one of its own, and all of them the CPU if that is given.

    Raises:
        MissingExtraError: accelerate is not installed.
        UsageError: The device cannot compute in this precision.
    """
    import_extra("accelerate", "train", "Training needs")
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    cpu = torch.device(device or "cuda").type == "cpu"
    on_cpu = cpu or not torch.cuda.is_available()
    if precision == "bfloat16" and on_cpu and not computes_bfloat16("cpu"):
        raise UsageError(
            "precision is bfloat16, for which this CPU has no instructions: a step would take a "
            "minute. Add precision=float32 to the command."
        )
    # What an earlier run of this process chose would be kept; a process group may stay.
    AcceleratorState._reset_state(reset_partial_state=True)
    patient = InitProcessGroupKwargs(timeout=_LONGEST_WAIT)
    # Accelerate takes the device of a single process by this variable only.
    is_single = int(os.environ.get("WORLD_SIZE", "1")) == 1
    chosen = {"ACCELERATE_TORCH_DEVICE": device} if device and is_single and not cpu else {}
    try:
        with patch_environment(**chosen):
            return Accelerator(
                cpu=cpu, mixed_precision=_PRECISIONS[precision], kwargs_handlers=[patient]
            )
    except ValueError as error:
        raise UsageError(f"precision {precision} does not work here: {error}") from error


class Trainer:
    """A run in memory. Every method is called by all processes; rank 0 alone writes.

    Args:
        task: What is trained; its network is moved to the accelerator's device.
        config: How long, and what is written when.
        accelerator: See `accelerator_for`.
        folder: Receives log.csv, validation.csv and last/.
        progress: Show a bar, or where standard error is no terminal a line now and then.
    """

    def __init__(
        self,
        task: Task,
        config: TrainerConfig,
        accelerator: Accelerator,
        folder: Path,
        *,
        progress: bool = True,
    ) -> None:
        self.task, self.config, self.folder = task, config, folder
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.shows_progress = progress and self.main
        self.step, self.best_step, self.stale = 0, 0, 0
        self.best: float | None = None
        self.best_state: dict[str, Tensor] = {}
        network = task.network
        network.to(accelerator.device)
        optimizer = task.optimizer()
        self.prepared, self.optimizer = accelerator.prepare(network, optimizer)
        self.network = network  # the same parameters, sharded or not, without a wrapper's names
        self.average = None if config.ema is None else Average(task.published, config.ema)
        self.tally = Tally(task.terms, task.sources, accelerator.device)
        columns = ["learning_rate", *self.tally.row(self.tally.sums)]
        self.log = Table(folder / LOG, columns)
        self.validation_log = Table(folder / VALIDATION, ["mean", *task.classes])
        self.begun = False

    # --- the run ------------------------------------------------------------------------------

    def train(self, until: int | None = None, *, validates: bool = True) -> None:
        """Train to the end, from where an interrupted run stopped.

        Args:
            until: Stop before this step instead; the next call goes on there.
            validates: Whether to validate on the way.

        Raises:
            UsageError: The folder holds another run, or the loss is no finite number.
            WeightsError: The checkpoint in the folder is damaged.
        """
        self.begin()
        config = self.config
        end = config.steps if until is None else until
        board = self.folder / "tensorboard" if self.main and config.tensorboard else None
        self.board = Board(board, self.step)
        self.progress = Progress(config.title, self.step, config.steps, self.shows_progress)
        if config.restores_best and self.step == 0 and not self.best_state and validates:
            self._validate()  # nothing that was learnt may be worse than not having learnt
        self._loop(end, validates)
        self.progress.close()
        self.board.close()
        if self.best_state and (self.step == config.steps or self._is_patient_no_more):
            checkpoints.restore(self._state(), self.best_state, "best weights")

    def _loop(self, end: int, validates: bool) -> None:
        config = self.config
        batches = self.task.batches(
            self.step, self.accelerator.process_index, self.accelerator.num_processes
        )
        while self.step < end and not self._is_patient_no_more:
            self.train_step(next(batches))
            self.progress.step()
            last = self.step == config.steps
            saves = last or self.step % config.save_every == 0
            if saves or self.step % config.log_every == 0:
                self.progress.show(self._write_row())
            every = config.validate_every
            if validates and every and (last or self.step % every == 0):
                self._validate()
            if saves:
                self.save()

    def train_step(self, batches: Sequence[Batch]) -> None:
        """Take one optimiser step; the loss is the mean over the scans of all its batches."""
        # What chance the network itself uses depends on seed, step and rank alone.
        torch.manual_seed(_seed(self.config.seed, self.step, self.accelerator.process_index))
        self.task.schedule.apply(self.optimizer, self.step, self.task.factor(self.step))
        self.prepared.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.accelerator.device)
        for index, batch in enumerate(batches):
            waits = index + 1 < len(batches)
            with self.accelerator.no_sync(self.prepared) if waits else nullcontext():
                terms = self.task.losses(self.prepared, batch, self.step, self.accelerator)
                loss = torch.stack([values.mean() for values in terms.values()]).sum()
                self.accelerator.backward(loss / len(batches))
            self.tally.add_losses(terms, batch.get("source"))
            total = total + loss.detach()
        limit = self.config.clip_norm
        trained = [tensor for tensor in self.prepared.parameters() if tensor.requires_grad]
        norm = torch.as_tensor(
            self.accelerator.clip_grad_norm_(trained, float("inf") if limit is None else limit)
        )
        self.tally.add_norm(norm)
        if self.accelerator.device.type == "cpu":  # elsewhere the step would have to wait
            self._refuse_endless(float(total), float(norm), self.step + 1)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.task.published, self.step)
        self.step += 1

    def _refuse_endless(self, loss: float, norm: float | None, step: int) -> None:
        # A scaler's gradients may overflow: it leaves such a step out.
        is_finite = norm is None or math.isfinite(norm) or self.accelerator.scaler is not None
        if not (math.isfinite(loss) and is_finite):
            also = f", the norm of its gradient {norm}" if math.isfinite(loss) else ""
            raise UsageError(f"The loss is {loss} at step {step}{also}: {self.config.advice}")

    @property
    def _is_patient_no_more(self) -> bool:
        return self.config.patience is not None and self.stale >= self.config.patience

    # --- what it tells ------------------------------------------------------------------------

    def _write_row(self) -> dict[str, float | None]:
        """Write what was summed since the last row.

        Raises:
            UsageError: The loss is not a finite number.
        """
        sums: Any = self.accelerator.reduce(self.tally.sums, reduction="sum")
        row = self.tally.row(sums)
        self.tally.clear()
        self._refuse_endless(row["loss"] or 0.0, None, self.step)
        # The rate of the first group, which in pretraining holds the backbone's first layers.
        row = {"learning_rate": self.optimizer.param_groups[0]["lr"], **row}
        if self.main:
            self.log.append(self.step, row)
            self.board.write(self.step, row)
        return row

    def _validate(self) -> None:
        """Score the validation cases, shared among the processes; keep the best weights."""
        sums = dict(self.task.validate(self))
        if self.accelerator.num_processes > 1:
            there = {name: value.to(self.accelerator.device) for name, value in sums.items()}
            summed: Any = self.accelerator.reduce(there, reduction="sum")
            sums = {name: value.cpu() for name, value in summed.items()}
        scores = self.task.scores(sums)
        if not scores:
            return
        mean = sum(scores.values()) / len(scores)
        if self.main:
            self.validation_log.append(self.step, {"mean": mean, **scores})
            self.board.write(self.step, {"mean": mean, **scores}, "validation")
        if self.best is None or mean > self.best:
            self.best, self.best_step, self.stale = mean, self.step, 0
            if self.config.restores_best:
                self.best_state = checkpoints.gathered(self._state())
            self.task.improved(self)
        else:
            self.stale += 1
        self.progress.note(f"validation Dice {mean:.3f}, best {self.best:.3f}")

    # --- what it keeps ------------------------------------------------------------------------

    def published_state(self) -> dict[str, Tensor]:
        """Return the weights that the run publishes, whole on the CPU: the average, if any."""
        live = _tensors(self.task.published)
        return checkpoints.gathered(live if self.average is None else self.average.values)

    def _state(self) -> dict[str, Tensor]:
        """What training changes: all tensors but frozen parameters, by name."""
        frozen = {name for name, p in self.network.named_parameters() if not p.requires_grad}
        return {
            name: tensor for name, tensor in _tensors(self.network).items() if name not in frozen
        }

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        plain: torch.optim.Optimizer = self.optimizer.optimizer
        return plain

    def save(self) -> None:
        """Write `last`. The optimiser and the weights of all processes are gathered for it."""
        scaler = self.accelerator.scaler
        checkpoint = Checkpoint(
            network=checkpoints.gathered(self._state()),
            average=None if self.average is None else checkpoints.gathered(self.average.values),
            optimizer=checkpoints.optimizer_state(self._plain_optimizer(), self.network),
            progress={
                "step": self.step,
                "best": self.best,
                "best_step": self.best_step,
                "stale": self.stale,
                # All chance comes from these and the step, so there is no generator to save.
                "rng": {"seed": self.config.seed, "processes": self.accelerator.num_processes},
                "identity": dict(self.task.identity),
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
            best=self.best_state or None,
        )
        if self.main:
            checkpoints.save(self.folder / LAST, checkpoint)
        self.accelerator.wait_for_everyone()

    def begin(self) -> None:
        """Go on from `last` if there is one; put the folder in order. Does nothing again.

        Raises:
            UsageError: The folder holds another run.
            WeightsError: The checkpoint is damaged.
        """
        if self.begun:
            return
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            recover_folder(self.folder / LAST)
        self.accelerator.wait_for_everyone()
        found = (self.folder / LAST).is_dir()
        if found:
            self._restore(checkpoints.load(self.folder / LAST))
        self.accelerator.wait_for_everyone()
        if self.main:
            # Without a checkpoint nothing is done, not even the validation before the first step.
            for table in (self.log, self.validation_log):
                table.continue_from(self.step if found else -1)
        self.accelerator.wait_for_everyone()
        self.begun = True

    def _restore(self, saved: Checkpoint) -> None:
        progress = saved.progress
        now, before = dict(self.task.identity), progress.get("identity", {})
        differing = sorted(k for k in now.keys() | before.keys() if now.get(k) != before.get(k))
        if differing:
            raise UsageError(
                f"{self.folder} was trained on other data or with other settings "
                f"({', '.join(differing)} differ). Bring those back, or use another output folder."
            )
        processes = progress["rng"]["processes"]
        if processes != self.accelerator.num_processes:
            raise UsageError(
                f"{self.folder} was trained by {processes} processes and there are "
                f"{self.accelerator.num_processes} now, which would see other samples. Start as "
                "many, or use another output folder."
            )
        if progress["step"] > self.config.steps:
            raise UsageError(
                f"{self.folder} has done {progress['step']} steps, more than the "
                f"{self.config.steps} asked for. Ask for more, or use another output folder."
            )
        self.step, self.best = progress["step"], progress["best"]
        self.best_step, self.stale = progress["best_step"], progress["stale"]
        self.best_state = dict(saved.best or {})
        checkpoints.restore(self._state(), saved.network, "network")
        if self.average is not None:
            checkpoints.restore(self.average.values, saved.average or {}, "average")
        checkpoints.restore_optimizer(self._plain_optimizer(), self.network, saved.optimizer)
        if self.accelerator.scaler is not None and progress["scaler"]:
            self.accelerator.scaler.load_state_dict(progress["scaler"])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's state without what is no tensor."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _seed(*numbers: int) -> int:
    """One seed of several numbers, for torch."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
