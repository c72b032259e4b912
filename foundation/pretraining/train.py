"""Train the embedded weights on label maps, open CTs and phantoms; one command, resumable.

    python -m foundation.pretraining.train DATA RUN [--hold-out FOLDER ...] [--steps N ...]

DATA is a folder of open CTs and label maps, RUN receives `last.pt` (everything needed to go on),
`log.csv` and, at the end, `model/` (a saved model). Started again with the same arguments it goes
on where it stopped and sees the very patches it would have seen.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from foundation.config import ClassSpec, ModelConfig, Preprocessing
from foundation.errors import UsageError
from foundation.hub import save_pretrained
from foundation.model import UniversalModel
from foundation.pretraining.losses import masked_loss
from foundation.pretraining.sampler import Patches, PatchSettings, Sample
from foundation.pretraining.sources import load_anatomies
from foundation.taxonomy import CLASSES
from foundation.text import MINILM, class_prompt, embed_classes, load_bank


@dataclass(frozen=True)
class Settings:
    """What a run depends on; together with the data it determines the weights.

    The learning rate warms up, stays, and falls linearly to zero over the last `decay` of `steps`.
    ema: the published weights are a running average with this decay.
    """

    steps: int = 4600
    batch_size: int = 2
    learning_rate: float = 3e-3
    head_learning_rate: float = 5e-4
    weight_decay: float = 1e-4
    warm_up: int = 100
    decay: float = 0.3
    clip: float = 5.0
    ema: float = 0.998
    seed: int = 1
    hold_out: tuple[str, ...] = ()
    patches: PatchSettings = field(default_factory=PatchSettings)


def build_model(settings: Settings) -> UniversalModel:
    """The untrained embedded model: LiteUNet under a text-driven head on all-MiniLM-L6-v2."""
    torch.manual_seed(settings.seed)
    patches = settings.patches
    config = ModelConfig(
        name="universal-ct",
        backbone="lite_unet",
        classes=tuple(
            ClassSpec(c.name, class_prompt(c.display.lower(), MINILM), c.parent) for c in CLASSES
        ),
        text=MINILM,
        standardise_text=True,
        preprocessing=Preprocessing(
            spacing_mm=(patches.spacing_mm,) * 3,
            hu_windows=patches.hu_windows,
            patch_size=(patches.patch_size,) * 3,
        ),
    )
    model = UniversalModel(config, embed_classes([c.prompt for c in config.classes], MINILM))
    mean, scale = load_bank().mean_and_scale()
    model.head.text_shift.copy_(torch.as_tensor(mean))
    model.head.text_scale.copy_(torch.as_tensor(scale))
    return model


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Warm-up, plateau and linear decay, as a factor of the full learning rate."""
    decay_steps = max(1, round(settings.decay * settings.steps))
    rising = min(1.0, (step + 1) / settings.warm_up)
    falling = min(1.0, (settings.steps - step) / decay_steps)
    return min(rising, falling)


class Trainer:
    """The state of a run: model, average, optimiser and step, saved and restored as one."""

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
        nn.init.constant_(self.auxiliary.bias, -3.0)
        head = self.model.head
        generating = [head.controller, head.text_projection, head.global_feature]
        direct = [self.model.backbone, head.feature_projection, self.auxiliary]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(nn.ModuleList(part).parameters()), "full": rate}
                for part, rate in (
                    (direct, settings.learning_rate),
                    (generating, settings.head_learning_rate),
                )
            ],
            weight_decay=settings.weight_decay,
        )
        self.step = 0

    def train_step(self, batch: Sample) -> dict[str, float]:
        """One optimiser step; returns the loss terms."""
        factor = learning_rate_factor(self.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full"] * factor
        self.model.train()
        on_device = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}  # type: ignore[attr-defined]
        logits, features = self.model.logits_at(on_device["image"], on_device["voxels"])
        truth = (on_device["target"], on_device["annotated"], on_device["weight"])
        terms = masked_loss(logits, *truth)
        helping = masked_loss(self.auxiliary(features), *truth)
        terms["auxiliary"] = torch.stack(list(helping.values())).sum()
        loss = sum(terms.values(), torch.zeros((), device=self.device))
        if not torch.isfinite(loss):
            raise UsageError(f"The loss is {loss.item()} at step {self.step}: lower learning_rate.")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self._update_average()
        self.step += 1
        return {name: value.item() for name, value in terms.items()} | {"norm": norm.item()}

    def _update_average(self) -> None:
        # Short memory at first, or the random start would linger in the average.
        decay = min(self.settings.ema, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)

    def save(self, path: Path) -> None:
        """Write the whole state under a temporary name, then rename."""
        temporary = path.with_suffix(".tmp")
        torch.save(
            {
                "settings": dataclasses.asdict(self.settings),
                "step": self.step,
                "model": self.model.state_dict(),
                "average": self.average,
                "auxiliary": self.auxiliary.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            temporary,
        )
        os.replace(temporary, path)

    def restore(self, path: Path) -> None:
        """Go on from `path`.

        Raises:
            UsageError: it was written by a run with other settings.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        mine = dataclasses.asdict(self.settings)
        differing = sorted(k for k in mine if mine[k] != state["settings"].get(k))
        if set(differing) - {"steps", "decay"}:  # a run may be made longer or shorter
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


def _batches(settings: Settings, data: Path, step: int) -> Iterator[Sample]:
    anatomies = load_anatomies(data, settings.hold_out)
    size = settings.batch_size
    patches = Patches(
        anatomies, settings.patches, settings.seed, step * size, settings.steps * size
    )
    return iter(
        DataLoader(
            patches,
            batch_size=size,
            num_workers=1,
            prefetch_factor=4,
            worker_init_fn=_one_thread,
            pin_memory=torch.cuda.is_available(),
        )
    )


def train(data: Path, run: Path, settings: Settings, device: torch.device) -> Path:
    """Train to the end, or go on with an interrupted run; returns the saved model's folder."""
    run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, device)
    checkpoint = run / "last.pt"
    if checkpoint.is_file():
        trainer.restore(checkpoint)
    log = run / "log.csv"
    recent: dict[str, float] = {}
    started, first = time.monotonic(), trainer.step
    progress = tqdm(
        _batches(settings, data, trainer.step), initial=trainer.step, total=settings.steps
    )
    for batch in progress:
        for name, value in trainer.train_step(batch).items():
            recent[name] = 0.95 * recent.get(name, value) + 0.05 * value
        progress.set_postfix({name: f"{value:.3f}" for name, value in recent.items()})
        if trainer.step % 50 == 0 or trainer.step == settings.steps:
            seconds = (time.monotonic() - started) / (trainer.step - first)
            _append(log, {"step": trainer.step, "seconds_per_step": seconds, **recent})
            trainer.save(checkpoint)
    folder = run / "model"
    save_pretrained(trainer.averaged_model(), folder, dtype=torch.float16)
    return folder


def _append(log: Path, row: dict[str, float]) -> None:
    is_new = not log.exists()
    with log.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow({k: v if isinstance(v, int) else f"{v:.4f}" for k, v in row.items()})


def main() -> None:
    """Entry point of `python -m foundation.pretraining.train`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder of open CTs and label maps")
    parser.add_argument("run", type=Path, help="folder of the run, new or to go on with")
    parser.add_argument("--hold-out", nargs="*", default=[], help="folders of DATA to leave out")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--decay", type=float, default=Settings.decay)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    settings = Settings(
        steps=given.steps, decay=given.decay, seed=given.seed, hold_out=tuple(given.hold_out)
    )
    train(given.data, given.run, settings, torch.device(given.device))


if __name__ == "__main__":
    main()
