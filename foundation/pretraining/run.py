"""A pretraining run: what is trained, on which samples, and what is kept of it.

    pretrain("universal-ct", store="store", output="runs/first")

RUN receives config.yaml, folds.json, log.csv, validation.csv, last/ (what a resume needs), best/,
held_out/ and model/ (saved models; best/ only with validation, held_out/ is the model before a
stage that trains on all cases). Started again it goes on where it stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foundation.errors import UsageError
from foundation.evaluation.scoring import mean_dice, validate
from foundation.files import recover_folder, replacing
from foundation.hardware import keep_freed_memory, trains_in_bfloat16
from foundation.hub.saved import save_pretrained
from foundation.model import UniversalModel
from foundation.networks.backbones import build_backbone
from foundation.pretraining.config import RunConfig, StageConfig
from foundation.pretraining.folds import Folds, held_out_cases, make_folds, read_folds
from foundation.pretraining.network import (
    build_network,
    exclusive_classes,
    learning_rates,
    with_own_classes,
)
from foundation.pretraining.reading import differences, dump, load_config, smoke, with_store
from foundation.pretraining.sources import batches, build_sources, open_store
from foundation.training.losses import published_losses, scan_losses
from foundation.training.mixture import Mixture, fingerprint
from foundation.training.schedule import Schedule, build_adamw
from foundation.training.trainer import Batch, Trainer, TrainerConfig, accelerator_for

if TYPE_CHECKING:
    from accelerate import Accelerator

CONFIG, FOLDS = "config.yaml", "folds.json"
BEST, HELD_OUT, MODEL = "best", "held_out", "model"
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

    For many processes, start it by `accelerate launch` or `torchrun`.

    Args:
        config: A YAML file, the name of a shipped configuration, a mapping or a `RunConfig`.
        store: Made by `universal-ct prepare`.
        output: Folder of the run; runs/<name> if not given.
        overrides: "key=value", as in YAML.
        smoke_test: Two steps on a phantom, on the CPU.
        cpu: Leave GPUs alone.
        progress: Show how far it is.

    Returns:
        The folder of the saved model.

    Raises:
        UsageError: The configuration is wrong, there is nothing to train on, or `output` belongs
            to a run with another configuration or other data.
        MissingExtraError: An extra that the configuration needs is not installed.
        HubError: The text encoder or the weights to start from cannot be had.
        WeightsError: They are damaged.
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
    accelerator = accelerator_for(config.precision, "cpu" if cpu or smoke_test else None)
    if accelerator.device.type == "cpu":
        keep_freed_memory()  # a step of the embedded model then takes half the time
    return Pretraining(config, accelerator, run).train(progress=progress)


class Pretraining:
    """A run as the trainer takes it; see `training.trainer.Task`.

    Args:
        config: What is trained, on what.
        accelerator: See `accelerator_for`.
        run: Its folder. Nothing is written to it before all that can be wrong has been found right.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, run: Path) -> None:
        self.config, self.accelerator, self.run = config, accelerator, run
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
        self.identity = {"data": fingerprint(self.store, self.mixture)}
        self.network = build_network(config)
        if config.precision == "bfloat16":
            _check_bfloat16(config, self.published.backbone.strides[-1], accelerator.device)
        if config.compile:
            self.network.compile()
        self.exclusive = exclusive_classes(config).to(accelerator.device)
        self.schedule = Schedule(config.schedule, config.steps)
        self.sources = self.mixture.names
        self.classes = self.published.classes
        self.terms = [
            name for name in ("dice", "binary", "exclusive") if getattr(config.loss, name)
        ]
        self.terms += ["auxiliary"] if config.loss.auxiliary else []

    @property
    def published(self) -> UniversalModel:
        """As `Task.published`."""
        return self.network.model

    # --- the run ------------------------------------------------------------------------------

    def trainer(self, *, progress: bool = True) -> Trainer:
        """Return what trains it."""
        config = self.config
        settings = TrainerConfig(
            steps=config.steps,
            seed=config.seed,
            clip_norm=config.optimizer.clip_norm,
            ema=config.ema,
            save_every=config.save_every,
            log_every=config.logging.every,
            validate_every=config.validation.every if self.validated else 0,
            tensorboard=config.logging.tensorboard,
            title="pretrain",
            advice="lower optimizer.learning_rate, or set optimizer.clip_norm.",
        )
        return Trainer(self, settings, self.accelerator, self.run, progress=progress)

    def train(self, *, progress: bool = True) -> Path:
        """Train to the end, or go on; returns the folder of the saved model."""
        trainer = self.trainer(progress=progress)
        if trainer.main:
            for name in (BEST, HELD_OUT, MODEL):
                recover_folder(self.run / name)
        trainer.begin()
        if trainer.main:
            with replacing(self.run / CONFIG) as temporary:
                temporary.write_text(dump(self.config), encoding="utf-8")
            if self.folds is not None:
                self.folds.write(self.run / FOLDS)
        first_of_all = sum(stage.steps for stage in self.config.stages if not stage.all_cases)
        if trainer.step <= first_of_all < self.config.steps:
            trainer.train(until=first_of_all)
            self._save_model(trainer, HELD_OUT)
        # What is trained on is no measure any more.
        trainer.train(validates=first_of_all == self.config.steps)
        return self._save_model(trainer, MODEL)

    def stage(self, step: int) -> StageConfig:
        """Return the stage of a step."""
        ends = itertools.accumulate(stage.steps for stage in self.config.stages)
        stages = zip(ends, self.config.stages, strict=True)
        return next((stage for end, stage in stages if step < end), self.config.stages[-1])

    # --- what the trainer asks for ------------------------------------------------------------

    def optimizer(self) -> torch.optim.Optimizer:
        """As `Task.optimizer`."""
        settings = self.config.optimizer
        rates = learning_rates(self.network, settings)
        return build_adamw(
            self.network, rates, betas=settings.betas, weight_decay=settings.weight_decay
        )

    def factor(self, step: int) -> float:
        """As `Task.factor`: the stage's share."""
        return self.stage(step).rate

    def batches(self, first_step: int, rank: int, processes: int) -> Iterator[list[Batch]]:
        """As `Task.batches`."""
        samples = batches(
            self.mixture,
            self.config,
            self.classes,
            first_step=first_step,
            whole=self.whole,
            rank=rank,
            processes=processes,
        )
        for step in range(first_step, self.config.steps):
            yield [next(samples) for _ in range(self.stage(step).accumulation)]

    def losses(
        self, forward: Callable[..., Any], batch: Batch, step: int, accelerator: Accelerator
    ) -> dict[str, Tensor]:
        """As `Task.losses`; batches are collated `NumberedSample`s."""
        stage = self.stage(step)
        balance = self.config.loss.balance if stage.balance is None else stage.balance
        balance *= self.schedule.decline(step)
        device = accelerator.device
        there = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        image = there["image"]
        if self.config.channels_last:
            image = image.contiguous(memory_format=torch.channels_last_3d)
        logits, helping = forward(image, there["voxels"])
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

    def validate(self, trainer: Trainer) -> dict[str, Tensor]:
        """As `Task.validate`: of the published weights, on the held-out cases."""
        assert self.store is not None
        model = self._published(trainer).to(self.accelerator.device)
        keys = sorted(self.validated)[: self.config.validation.most]
        mine = keys[self.accelerator.process_index :: self.accelerator.num_processes]
        cases = [self.store.case(key) for key in mine]
        return {"dice": validate(model, cases, self.config.validation.overlap)}

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """As `Task.scores`."""
        return mean_dice(sums["dice"], self.classes)[0]

    def improved(self, trainer: Trainer) -> None:
        """As `Task.improved`."""
        self._save_model(trainer, BEST)

    # --- what it keeps ------------------------------------------------------------------------

    def _published(self, trainer: Trainer) -> UniversalModel:
        source = self.published
        model = UniversalModel(source.config, source.prompt_embedding.cpu())
        model.load_state_dict(trainer.published_state())
        return model.eval()

    def _save_model(self, trainer: Trainer, name: str) -> Path:
        folder = self.run / name
        model = self._published(trainer)  # every process takes part
        if trainer.main:
            save_pretrained(model, folder, dtype=_DTYPES[self.config.weights_dtype])
        self.accelerator.wait_for_everyone()
        return folder

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


def _check_bfloat16(config: RunConfig, stride: int, device: torch.device) -> None:
    for stage in config.stages:
        if not trains_in_bfloat16(device, [side // stride for side in stage.patch_size]):
            raise UsageError(
                f"patch_size is {stage.patch_size}, which leaves {config.model.backbone} "
                f"{min(stage.patch_size) // stride} voxels at its coarsest level, too few for "
                f"bfloat16 on a CPU. Give {3 * stride} or more, or precision=float32."
            )
