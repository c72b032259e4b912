"""The pretraining engine: one process or many, resumable at any moment, bit for bit on one.

    pretrain("universal-ct", store="store", output="runs/first")

RUN receives config.yaml, folds.json, log.csv, validation.csv, last/ (what a resume needs), best/,
held_out/ and model/ (saved models; best/ only with validation, held_out/ is the model before a
stage that trains on all cases). Started again it goes on where it stopped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from foundation.errors import MissingExtraError, UsageError
from foundation.evaluation.validation import mean_dice, validate
from foundation.files import recover_folder, replacing
from foundation.hardware import computes_bfloat16, keep_freed_memory, trains_in_bfloat16
from foundation.hub.saved import save_pretrained
from foundation.model import UniversalModel
from foundation.networks.backbones import build_backbone
from foundation.pretraining.config import RunConfig, StageConfig
from foundation.pretraining.folds import Folds, held_out_cases, make_folds, read_folds
from foundation.pretraining.network import (
    build_network,
    build_optimizer,
    exclusive_classes,
    with_own_classes,
)
from foundation.pretraining.reading import differences, dump, load_config, smoke, with_store
from foundation.pretraining.sources import batches, build_sources, open_store
from foundation.training import checkpoints
from foundation.training.checkpoints import Checkpoint
from foundation.training.ema import Average
from foundation.training.logs import Board, Progress, Table, Tally
from foundation.training.losses import published_losses, scan_losses
from foundation.training.mixture import Mixture, fingerprint
from foundation.training.schedule import build_schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

CONFIG, FOLDS, LOG, VALIDATION = "config.yaml", "folds.json", "log.csv", "validation.csv"
LAST, BEST, HELD_OUT, MODEL = "last", "best", "held_out", "model"
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def pretrain(
    config: str | Path | Mapping[str, Any] | RunConfig,
    *,
    store: str | Path | None = None,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    smoke_test: bool = False,
    cpu: bool = False,
    progress: bool = True,
) -> Path:
    """Train to the end, or go on with an interrupted run; returns the saved model's folder.

    config: a YAML file, the name of a shipped configuration, a mapping or a `RunConfig`.
    store: made by `universal-ct prepare`.
    output: folder of the run; runs/<name> if not given. overrides: "key=value", as in YAML.
    smoke_test: two steps on a phantom, on the CPU. cpu: leave GPUs alone.
    For many processes, start it by `accelerate launch` or `torchrun`.

    Raises:
        UsageError: the configuration is wrong, there is nothing to train on, or `output` belongs
            to a run with another configuration or other data.
        MissingExtraError: an extra that the configuration needs is not installed.
        HubError, WeightsError: the text encoder or the weights to start from cannot be had.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config, overrides)
    elif overrides:
        raise UsageError("Overrides change a file or a mapping; use dataclasses.replace instead.")
    config = with_store(config, store)
    if smoke_test:
        channels = len(config.model.hu_windows)
        options = config.model.backbone_options
        config = smoke(config, build_backbone(config.model.backbone, channels, **options).divisor)
    run = Path(output) if output is not None else Path("runs") / config.name
    accelerator = accelerator_for(config, cpu or smoke_test)
    if accelerator.device.type == "cpu":
        keep_freed_memory()  # a step of the embedded model then takes half the time
    engine = Engine(config, accelerator, run, progress=progress)
    return engine.train()


def accelerator_for(config: RunConfig, cpu: bool = False) -> Accelerator:
    """Accelerate's view of this process: its device, its rank, its precision.

    Raises:
        MissingExtraError: accelerate is not installed.
        UsageError: the device cannot compute in the configuration's precision.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise MissingExtraError(
            "Pretraining needs accelerate, which is not installed: "
            "pip install 'universal-ct[train]'"
        ) from error
    on_cpu = cpu or not torch.cuda.is_available()
    if config.precision == "bfloat16" and on_cpu and not computes_bfloat16("cpu"):
        raise UsageError(
            "precision is bfloat16, for which this CPU has no instructions: a step would take a "
            "minute. Add precision=float32 to the command."
        )
    # What an earlier run of this process chose would be kept; the process group may stay.
    AcceleratorState._reset_state()
    try:
        return Accelerator(cpu=cpu, mixed_precision=_PRECISIONS[config.precision])
    except ValueError as error:
        raise UsageError(f"precision {config.precision} does not work here: {error}") from error


def _check_bfloat16(config: RunConfig, stride: int, device: torch.device) -> None:
    for stage in config.stages:
        if not trains_in_bfloat16(device, [side // stride for side in stage.patch_size]):
            raise UsageError(
                f"patch_size is {stage.patch_size}, which leaves {config.model.backbone} "
                f"{min(stage.patch_size) // stride} voxels at its coarsest level, too few for "
                f"bfloat16 on a CPU. Give {3 * stride} or more, or precision=float32."
            )


class Engine:
    """A run in memory. Every method is called by all processes; rank 0 alone writes."""

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, run: Path, *, progress: bool = True
    ) -> None:
        self.config, self.accelerator, self.run = config, accelerator, run
        self.shows_progress = progress and accelerator.is_main_process
        self.step = 0
        self.best: float | None = None
        # Nothing is written before all that can be wrong has been found right.
        self.store = open_store(config)
        config = self.config = with_own_classes(config, self.store)
        self.folds = self._find_folds()
        self._check_earlier_run()
        keys = self.store.keys() if self.store else []
        given = config.validation
        if self.store is None and (given.fold is not None or given.hold_out):
            raise UsageError("Held-out cases are of a store: give --store, or hold out none.")
        self.validated, held_out = held_out_cases(keys, self.folds, given.fold, given.hold_out)
        self.mixture = Mixture(build_sources(config, self.store, held_out), config.seed)
        self.whole: Mixture | None = None
        if any(stage.all_cases for stage in config.stages):
            never = self.folds.test if self.folds else frozenset()
            self.whole = Mixture(build_sources(config, self.store, never), config.seed)
            if self.whole.names != self.mixture.names:
                missing = sorted({*self.whole.names} - {*self.mixture.names})
                raise UsageError(f"All cases of {', '.join(missing)} are held out: hold out fewer.")
        self.fingerprint = fingerprint(self.store, self.mixture)
        self._build()

    def _build(self) -> None:
        config, accelerator = self.config, self.accelerator
        network = build_network(config)
        if config.precision == "bfloat16":
            _check_bfloat16(config, network.model.backbone.strides[-1], accelerator.device)
        self.classes = network.model.classes
        self.exclusive = exclusive_classes(config).to(accelerator.device)
        network.to(accelerator.device)
        optimizer = build_optimizer(network, config)
        if config.compile:
            network.compile()
        self.prepared, prepared_optimizer = accelerator.prepare(network, optimizer)
        self.optimizer: Any = prepared_optimizer
        self.network = network  # the same parameters, sharded or not, without a wrapper's names
        self.schedule = build_schedule(optimizer, config.schedule, config.steps)
        self.average = None if config.ema is None else Average(self.network.model, config.ema)
        terms = [name for name in ("dice", "binary", "exclusive") if getattr(config.loss, name)]
        terms += ["auxiliary"] if config.loss.auxiliary else []
        self.tally = Tally(terms, self.mixture.names, accelerator.device)
        columns = ["learning_rate", *self.tally.row(self.tally.sums)]
        self.log = Table(self.run / LOG, columns)
        self.validation_log = Table(self.run / VALIDATION, ["mean", *self.classes])

    # --- the run ------------------------------------------------------------------------------

    def train(self) -> Path:
        """Run to the end; returns the folder of the saved model."""
        config, main = self.config, self.accelerator.is_main_process
        self._resume()
        board = Board(
            self.run / "tensorboard" if main and config.logging.tensorboard else None, self.step
        )
        progress = Progress(self.step, config.steps, self.shows_progress)
        samples = batches(
            self.mixture,
            config,
            self.classes,
            first_step=self.step,
            whole=self.whole,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        while self.step < config.steps:
            if self.step == self._first_of_all_cases:
                self._save_model(HELD_OUT)
            self.train_step([next(samples) for _ in range(self.stage.accumulation)])
            progress.step()
            last = self.step == config.steps
            saves = last or self.step % config.save_every == 0
            if saves or self.step % config.logging.every == 0:
                progress.show(self._write_row(board))
            every = config.validation.every
            held_out = self.step <= self._first_of_all_cases
            if self.validated and every and held_out and (last or self.step % every == 0):
                self._validate(board)
            if saves:
                self._save()
        progress.close()
        board.close()
        return self._save_model(MODEL)

    @property
    def stage(self) -> StageConfig:
        """The stage of the next step."""
        ends = itertools.accumulate(stage.steps for stage in self.config.stages)
        stages = zip(ends, self.config.stages, strict=True)
        return next((stage for end, stage in stages if self.step < end), self.config.stages[-1])

    @property
    def _first_of_all_cases(self) -> int:
        """The first step that trains on the held-out cases; the run's end if none does."""
        return sum(stage.steps for stage in self.config.stages if not stage.all_cases)

    def train_step(self, micro_batches: Sequence[dict[str, Tensor]]) -> None:
        """One optimiser step over one or more batches; the loss is the mean over all their scans.

        micro_batches: collated `NumberedSample`s. What chance the network itself uses (dropout)
        depends on seed, step and rank alone.
        """
        torch.manual_seed(_seed(self.config.seed, self.step, self.accelerator.process_index))
        stage = self.stage
        balance = self.config.loss.balance if stage.balance is None else stage.balance
        balance *= self.schedule.decline(self.step)
        self.schedule.apply(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] *= stage.rate
        self.prepared.train()
        self.optimizer.zero_grad(set_to_none=True)
        for index, batch in enumerate(micro_batches):
            waits = index + 1 < len(micro_batches)
            with self.accelerator.no_sync(self.prepared) if waits else nullcontext():
                terms = self._losses(batch, balance)
                loss = torch.stack([values.mean() for values in terms.values()]).sum()
                self.accelerator.backward(loss / len(micro_batches))
            self.tally.add_losses(terms, batch["source"])
        limit = self.config.optimizer.clip_norm
        norm = self.accelerator.clip_grad_norm_(
            self.prepared.parameters(), float("inf") if limit is None else limit
        )
        self.tally.add_norm(torch.as_tensor(norm))
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.network.model, self.step)
        self.step += 1

    def _losses(self, batch: Mapping[str, Tensor], balance: float) -> dict[str, Tensor]:
        """The weighted terms of the loss of each scan, (B,) each."""
        device = self.accelerator.device
        there = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        image = there["image"]
        if self.config.channels_last:
            image = image.contiguous(memory_format=torch.channels_last_3d)
        logits, helping = self.prepared(image, there["voxels"])
        truth = (there["target"], there["annotated"], there["weight"])
        terms = self._weighted(logits.float(), truth, balance)
        if helping is not None:
            helped = self._weighted(helping.float(), truth, balance).values()
            terms["auxiliary"] = self.config.loss.auxiliary * torch.stack([*helped]).sum(0)
        return terms

    def _weighted(
        self, logits: Tensor, truth: tuple[Tensor, Tensor, Tensor], balance: float
    ) -> dict[str, Tensor]:
        weights = self.config.loss
        if weights.exclusive:
            terms = scan_losses(logits, *truth, balance=balance, exclusive=self.exclusive)
        else:
            terms = published_losses(logits, *truth)
        return {
            name: getattr(weights, name) * values
            for name, values in terms.items()
            if getattr(weights, name)
        }

    # --- what it tells ------------------------------------------------------------------------

    def _write_row(self, board: Board) -> dict[str, float | None]:
        """Write what was summed since the last row.

        Raises:
            UsageError: the loss is not a finite number.
        """
        sums: Any = self.accelerator.reduce(self.tally.sums, reduction="sum")
        row = self.tally.row(sums)
        self.tally.clear()
        if not math.isfinite(row["loss"] or 0.0):
            raise UsageError(
                f"The loss is {row['loss']} at step {self.step}: lower optimizer.learning_rate, "
                "or set optimizer.clip_norm."
            )
        # The rate of the first group, which holds the first layers of the backbone.
        row = {"learning_rate": self.optimizer.param_groups[0]["lr"], **row}
        if self.accelerator.is_main_process:
            self.log.append(self.step, row)
            board.write(self.step, row)
        return row

    def _validate(self, board: Board) -> None:
        """Measure Dice on the held-out cases, shared among the processes; keep the best model."""
        assert self.store is not None
        model = self._published()
        model.to(self.accelerator.device)
        keys = sorted(self.validated)[: self.config.validation.most]
        mine = keys[self.accelerator.process_index :: self.accelerator.num_processes]
        cases = [self.store.case(key) for key in mine]
        totals = validate(model, cases, self.config.validation.overlap).float()
        summed: Any = self.accelerator.reduce(totals.to(self.accelerator.device), reduction="sum")
        by_class, mean = mean_dice(summed.cpu().double(), self.classes)
        if mean is None:
            return
        row = {"mean": mean, **by_class}
        if self.accelerator.is_main_process:
            self.validation_log.append(self.step, row)
            board.write(self.step, row, "validation")
        if self.best is None or mean > self.best:
            self.best = mean
            self._save_model(BEST)

    # --- what it keeps ------------------------------------------------------------------------

    def _published(self) -> UniversalModel:
        """The model with the weights that the run publishes: the average, where it keeps one."""
        live = self.network.model.state_dict()
        state = checkpoints.gathered(live if self.average is None else self.average.values)
        source = self.network.model
        model = UniversalModel(source.config, source.prompt_embedding.cpu())
        model.load_state_dict(state)
        return model.eval()

    def _save_model(self, name: str) -> Path:
        folder = self.run / name
        model = self._published()
        if self.accelerator.is_main_process:
            save_pretrained(model, folder, dtype=_DTYPES[self.config.weights_dtype])
        self.accelerator.wait_for_everyone()
        return folder

    def _save(self) -> None:
        """Write `last`. The optimiser and the weights of all processes are gathered for it."""
        scaler = self.accelerator.scaler
        checkpoint = Checkpoint(
            network=checkpoints.gathered(self.network.state_dict()),
            average=None if self.average is None else checkpoints.gathered(self.average.values),
            optimizer=checkpoints.optimizer_state(self._plain_optimizer(), self.network),
            progress={
                "step": self.step,
                "best": self.best,
                # All chance comes from these and the step, so there is no generator to save.
                "rng": {"seed": self.config.seed, "processes": self.accelerator.num_processes},
                "data": self.fingerprint,
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
        )
        if self.accelerator.is_main_process:
            checkpoints.save(self.run / LAST, checkpoint)
        self.accelerator.wait_for_everyone()

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        plain: torch.optim.Optimizer = self.optimizer.optimizer
        return plain

    def _resume(self) -> None:
        """Go on from `last` if there is one, otherwise begin; the folder is put in order first."""
        if self.accelerator.is_main_process:
            self.run.mkdir(parents=True, exist_ok=True)
            for name in (LAST, BEST, HELD_OUT, MODEL):
                recover_folder(self.run / name)
        self.accelerator.wait_for_everyone()
        if (self.run / LAST).is_dir():
            self._restore(checkpoints.load(self.run / LAST))
        if self.accelerator.is_main_process:
            with replacing(self.run / CONFIG) as temporary:
                temporary.write_text(dump(self.config), encoding="utf-8")
            if self.folds is not None:
                self.folds.write(self.run / FOLDS)
            self.log.continue_from(self.step)
            self.validation_log.continue_from(self.step)
        self.accelerator.wait_for_everyone()

    def _restore(self, saved: Checkpoint) -> None:
        if saved.progress["data"] != self.fingerprint:
            raise UsageError(
                f"{self.run} was trained on other data than there is now: its store has changed. "
                "Bring that back, or use another output folder."
            )
        processes = saved.progress["rng"]["processes"]
        if processes != self.accelerator.num_processes:
            raise UsageError(
                f"{self.run} was trained by {processes} processes and there are "
                f"{self.accelerator.num_processes} now, which would see other samples. Start as "
                "many, or use another output folder."
            )
        if saved.progress["step"] > self.config.steps:
            raise UsageError(
                f"{self.run} has done {saved.progress['step']} steps, more than the "
                f"{self.config.steps} asked for. Ask for more, or use another output folder."
            )
        self.step, self.best = saved.progress["step"], saved.progress["best"]
        checkpoints.restore(self.network.state_dict(), saved.network, "network")
        if self.average is not None:
            checkpoints.restore(self.average.values, saved.average or {}, "average")
        checkpoints.restore_optimizer(self._plain_optimizer(), self.network, saved.optimizer)
        if self.accelerator.scaler is not None and saved.progress["scaler"]:
            self.accelerator.scaler.load_state_dict(saved.progress["scaler"])

    def _check_earlier_run(self) -> None:
        """Refuse a folder that a run with another configuration has written.

        Raises:
            UsageError: it did; names the keys.
        """
        path = self.run / CONFIG
        if not path.is_file():
            return
        if differing := differences(self.config, load_config(path)):
            raise UsageError(
                f"{self.run} holds a run with another configuration ({', '.join(differing)} "
                "differ). Use that one, or another output folder; steps and decay may change."
            )

    def _find_folds(self) -> Folds | None:
        """The folds of the run: of the file it names, of an earlier start, or made now."""
        if self.store is None:
            return None
        if self.config.validation.folds:
            return read_folds(Path(self.config.validation.folds))
        if (self.run / FOLDS).is_file():
            return read_folds(self.run / FOLDS)
        return make_folds(self.store.manifest["cases"], self.config.seed)


def _seed(*numbers: int) -> int:
    """One seed of several numbers, for torch."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
