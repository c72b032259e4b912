"""Train the embedded weights on label maps, open CTs and phantoms; one command, resumable.

    python -m foundation.pretraining.train DATA RUN [--hold-out FOLDER ...] [--steps N ...]

DATA is a folder of open CTs and label maps, or the word `phantoms`: generated anatomy alone. RUN
receives `last.pt` (everything needed to go on), `log.csv` and, at the end, `model/` (a saved
model). Started again with the same arguments it goes on where it stopped and sees the very patches
it would have seen: on one machine the weights are the same as without the interruption.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from foundation.config import ClassSpec, ModelConfig, Preprocessing
from foundation.errors import UniversalCTError, UsageError
from foundation.files import replacing
from foundation.hub import save_pretrained
from foundation.model import UniversalModel
from foundation.pretraining.losses import masked_loss
from foundation.pretraining.sampler import Patches, PatchSettings, Sample
from foundation.pretraining.sources import Anatomy, load_anatomies
from foundation.taxonomy import CLASSES
from foundation.text import (
    CLIP_VIT_B_32,
    MINILM,
    class_prompt,
    embed_classes,
    load_bank,
    load_encoder,
    mean_and_scale,
)

PHANTOMS = "phantoms"  # in the place of a folder of data
# MiniLM's weights come in a package and its bank with ours, so it is what the embedded weights use.
TEXT_ENCODERS = {"minilm": MINILM, "clip": CLIP_VIT_B_32}
_MAY_CHANGE = {"steps", "decay"}  # a run may be made longer or shorter


@dataclass(frozen=True)
class Settings:
    """What a run depends on; together with the data it determines the weights.

    The learning rate warms up, stays, and falls linearly to zero over the last `decay` of `steps`.
    balance: how much the loss favours small classes (see `masked_loss`) while the learning rate is
    high; it falls with it. clip: largest norm of the gradient. ema: the published weights are a
    running average with this decay. text: the prompts' encoder, a name of TEXT_ENCODERS. hold_out:
    folders of the data to leave out. backbone_options: of `LiteUNet`. The defaults are those of the
    embedded weights.
    """

    steps: int = 2450
    batch_size: int = 2
    learning_rate: float = 3e-3
    head_learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warm_up: int = 50
    decay: float = 0.55
    balance: float = 0.5
    clip: float = 5.0
    ema: float = 0.995
    seed: int = 1
    text: str = "minilm"
    hold_out: tuple[str, ...] = ()
    backbone_options: Mapping[str, Any] = field(default_factory=dict)
    patches: PatchSettings = field(default_factory=PatchSettings)


def build_model(settings: Settings) -> UniversalModel:
    """The untrained embedded model: LiteUNet under a text-driven head.

    Raises:
        HubError, MissingExtraError: the text encoder's weights cannot be had here.
    """
    torch.manual_seed(settings.seed)
    patches = settings.patches
    text = TEXT_ENCODERS[settings.text]
    if not text.revision:
        text = load_encoder(text).spec  # records which weights made the prompts
    config = ModelConfig(
        name="universal-ct",
        backbone="lite_unet",
        backbone_options=settings.backbone_options,
        classes=tuple(
            ClassSpec(c.name, class_prompt(c.display.lower(), text), c.parent) for c in CLASSES
        ),
        text=text,
        standardise_text=True,
        preprocessing=Preprocessing(
            spacing_mm=(patches.spacing_mm, patches.spacing_mm, patches.spacing_mm),
            hu_windows=patches.hu_windows,
            patch_size=(patches.patch_size, patches.patch_size, patches.patch_size),
        ),
    )
    embedding = embed_classes([c.prompt for c in config.classes], text)
    model = UniversalModel(config, embedding)
    # The bank's spread is the better measure, but it exists for one encoder only.
    bank = load_bank()
    mean, scale = mean_and_scale(bank.embeddings if text == bank.spec else embedding)
    model.head.text_shift.copy_(torch.as_tensor(mean))
    model.head.text_scale.copy_(torch.as_tensor(scale))
    return model


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Warm-up, plateau and linear decay, as a factor in [0, 1] of the full learning rate."""
    rising = min(1.0, (step + 1) / max(1, settings.warm_up))
    return min(rising, falling_factor(step, settings))


def falling_factor(step: int, settings: Settings) -> float:
    """1 until the last `decay` of the steps, over which it falls linearly to 0."""
    decay_steps = max(1, round(settings.decay * settings.steps))
    return min(1.0, (settings.steps - step) / decay_steps)


class Trainer:
    """The state of a run, saved and restored as one: model, its average, optimiser and step."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.model = build_model(settings).to(device)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        # A plain linear classifier beside the text-driven head, for training only: the backbone
        # learns from it at once, and the head's generated layers find features that are worth it.
        self.auxiliary = nn.Conv1d(
            self.model.backbone.full_channels, len(self.model.classes), 1, device=device
        )
        nn.init.constant_(self.auxiliary.get_parameter("bias"), -2.0)
        self.optimizer = self._build_optimizer()
        self.step = 0

    def _build_optimizer(self) -> torch.optim.Optimizer:
        head = self.model.head
        generating = [head.controller, head.text_projection, head.global_feature]
        direct = [self.model.backbone, head.feature_projection, self.auxiliary]
        full_rates = (
            (direct, self.settings.learning_rate),
            (generating, self.settings.head_learning_rate),
        )
        return torch.optim.AdamW(
            [
                {"params": list(nn.ModuleList(part).parameters()), "full": rate}
                for part, rate in full_rates
            ],
            weight_decay=self.settings.weight_decay,
        )

    def train_step(self, batch: Sample) -> dict[str, float]:
        """One optimiser step; returns the loss terms and the norm of the gradient.

        Raises:
            UsageError: the loss is not a finite number.
        """
        factor = learning_rate_factor(self.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full"] * factor
        self.model.train()
        terms = self._losses(batch)
        loss = sum(terms.values(), torch.zeros((), device=self.device))
        if not torch.isfinite(loss):
            raise UsageError(f"The loss is {loss.item()} at step {self.step}: lower learning_rate.")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters(), self.settings.clip)
        self.optimizer.step()
        self._update_average()
        self.step += 1
        return {name: value.item() for name, value in terms.items()} | {"norm": norm.item()}

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.auxiliary.parameters()]

    def _losses(self, batch: Sample) -> dict[str, Tensor]:
        tensors = cast("dict[str, Tensor]", batch)
        on_device = {k: v.to(self.device, non_blocking=True) for k, v in tensors.items()}
        logits, features = self.model.logits_at(on_device["image"], on_device["voxels"])
        truth = (on_device["target"], on_device["annotated"], on_device["weight"])
        balance = self.settings.balance * falling_factor(self.step, self.settings)
        terms = masked_loss(logits, *truth, balance)
        helping = masked_loss(self.auxiliary(features), *truth, balance)
        terms["auxiliary"] = torch.stack(list(helping.values())).sum()
        return terms

    def _update_average(self) -> None:
        # Short memory at first, or the random start would linger in the average.
        decay = min(self.settings.ema, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)

    def save(self, path: Path) -> None:
        """Write the whole state; an older file at `path` stays whole until then."""
        state = {
            "settings": dataclasses.asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average,
            "auxiliary": self.auxiliary.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path) -> None:
        """Go on from `path`.

        Raises:
            UsageError: it was written by a run with other settings.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        mine = dataclasses.asdict(self.settings)
        theirs = {**dataclasses.asdict(Settings()), **state["settings"]}
        differing = sorted(name for name in mine if mine[name] != theirs[name])
        if set(differing) - _MAY_CHANGE:
            raise UsageError(
                f"{path} was written with other settings ({', '.join(differing)}). "
                "Use those, or another folder."
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.auxiliary.load_state_dict(state["auxiliary"])
        self.optimizer.load_state_dict(state["optimizer"])

    def averaged_model(self) -> UniversalModel:
        """A copy of the model with the averaged weights."""
        model = build_model(self.settings)
        model.load_state_dict(self.average)
        return model.eval()


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _batches(
    anatomies: Sequence[Anatomy], settings: Settings, step: int, workers: int
) -> Iterator[Sample]:
    """The batches of the run from `step` on, made beside the training by `workers` processes."""
    size = settings.batch_size
    patches = Patches(
        anatomies, settings.patches, settings.seed, step * size, settings.steps * size
    )
    return iter(
        DataLoader(
            patches,
            batch_size=size,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_one_thread,
            pin_memory=torch.cuda.is_available(),
        )
    )


def train(
    data: Path | None,
    run: Path,
    settings: Settings,
    device: torch.device,
    *,
    workers: int = 1,
    save_every: int = 50,
) -> Path:
    """Train to the end, or go on with an interrupted run; returns the saved model's folder.

    data: folder of open data; None for phantoms alone. save_every: steps between checkpoints.

    Raises:
        UsageError: no training data in `data`, or `run` belongs to a run with other settings.
    """
    if data is None:
        anatomies = []
        only_phantoms = dataclasses.replace(settings.patches, phantom_share=1.0)
        settings = dataclasses.replace(settings, patches=only_phantoms)
    else:
        anatomies = load_anatomies(data, settings.hold_out)
    run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, device)
    checkpoint = run / "last.pt"
    if checkpoint.is_file():
        trainer.restore(checkpoint)
    log = run / "log.csv"
    recent: dict[str, float] = {}
    started, first = time.monotonic(), trainer.step
    progress = tqdm(
        _batches(anatomies, settings, trainer.step, workers),
        initial=trainer.step,
        total=settings.steps,
    )
    for batch in progress:
        for name, value in trainer.train_step(batch).items():
            recent[name] = 0.95 * recent.get(name, value) + 0.05 * value
        progress.set_postfix({name: f"{value:.3f}" for name, value in recent.items()})
        if trainer.step % save_every == 0 or trainer.step == settings.steps:
            seconds = (time.monotonic() - started) / (trainer.step - first)
            _append(log, {"step": trainer.step, "seconds_per_step": seconds, **recent})
            trainer.save(checkpoint)
    folder = run / "model"
    save_pretrained(trainer.averaged_model(), folder, dtype=torch.float16)
    return folder


def _append(log: Path, row: Mapping[str, float]) -> None:
    is_new = not log.exists()
    with log.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow({k: v if isinstance(v, int) else f"{v:.4f}" for k, v in row.items()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m foundation.pretraining.train`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "data", help=f"folder of open CTs and label maps, or {PHANTOMS}: generated anatomy alone"
    )
    parser.add_argument("run", type=Path, help="folder of the run, new or to go on with")
    parser.add_argument("--hold-out", nargs="*", default=[], help="folders of DATA to leave out")
    parser.add_argument("--text", choices=TEXT_ENCODERS, default=Settings.text)
    numbers = [f for f in dataclasses.fields(Settings) if isinstance(f.default, (int, float))]
    for number in numbers:
        option = "--" + number.name.replace("_", "-")
        kind = type(number.default)
        parser.add_argument(option, type=kind, default=number.default, help="default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    chosen = {number.name: getattr(given, number.name) for number in numbers}
    settings = Settings(text=given.text, hold_out=tuple(given.hold_out), **chosen)
    data = None if given.data == PHANTOMS else Path(given.data)
    try:
        train(data, given.run, settings, torch.device(given.device))
    except UsageError as error:
        parser.error(str(error))
    except UniversalCTError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
