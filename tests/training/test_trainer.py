"""The training loop: it learns, stops, keeps its best weights, and a kill costs nothing."""

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foundation.errors import UsageError
from foundation.training import logs
from foundation.training.losses import masked_loss
from foundation.training.schedule import Schedule, ScheduleConfig
from foundation.training.trainer import Trainer, TrainerConfig, accelerator_for

TARGET = torch.tensor([[[1, 0, 0, 0], [0, 1, 1, 0]]]).bool()
CONFIG = TrainerConfig(
    steps=12, validate_every=3, patience=9, save_every=2, log_every=1, restores_best=True
)


class Logits(nn.Module):
    """The logits themselves as parameters: what a network could at best learn."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(1, 2, 4))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, noise: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return self.values + 0.1 * noise


class Learning:
    """A task of the trainer's."""

    terms, sources, classes = ("dice", "binary", "exclusive"), (), ("first", "second")

    def __init__(self, steps: int = 12, rate: float = 0.1, seed: int = 1) -> None:
        self.network = self.published = Logits()
        self.schedule = Schedule(ScheduleConfig("cosine_to_floor", 2), steps)
        self.steps, self.rate, self.identity = steps, rate, {"seed": seed}
        self.calls: list[int] = []
        self.scripted: Iterator[dict[str, float]] | None = None
        self.improvements: list[int] = []

    def optimizer(self) -> torch.optim.Optimizer:
        group = {"params": [self.network.values], "lr": self.rate, "initial_lr": self.rate}
        return torch.optim.AdamW([group])

    def factor(self, step: int) -> float:
        return 1.0

    def batches(self, first_step: int, rank: int, processes: int) -> Iterator[list[Any]]:
        for step in range(first_step, self.steps):
            self.calls.append(step)
            generator = torch.Generator().manual_seed(step)
            yield [{"noise": torch.randn(1, 2, 4, generator=generator)} for _ in range(2)]

    def losses(self, forward: Any, batch: Any, step: int, accelerator: Any) -> dict[str, Tensor]:
        known, weight = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 4)
        exclusive = torch.ones(2, dtype=torch.bool)
        terms = masked_loss(forward(batch["noise"]), TARGET, known, weight, 0.1, exclusive)
        return {name: value[None] for name, value in terms.items()}

    def validate(self, trainer: Trainer) -> dict[str, Tensor]:
        said, truth = self.network.values.detach()[0] > 0, TARGET[0]
        return {"dice": (said & truth).sum(1) * 2 / (said.sum(1) + truth.sum(1))}

    def scores(self, sums: Any) -> dict[str, float]:
        if self.scripted is not None:
            return next(self.scripted)
        return dict(zip(self.classes, sums["dice"].tolist(), strict=True))

    def improved(self, trainer: Trainer) -> None:
        self.improvements.append(trainer.step)


def trainer(task: Learning, folder: Path, **changes: Any) -> Trainer:
    accelerator = accelerator_for("float32", "cpu")
    return Trainer(task, replace(CONFIG, **changes), accelerator, folder, progress=False)


def test_it_learns_and_leaves_its_best_weights(tmp_path: Path) -> None:
    task = Learning()
    run = trainer(task, tmp_path)
    run.train()
    assert task.scores(task.validate(run)) == {"first": 1.0, "second": 1.0}
    assert run.best == 1.0 and run.best_step <= run.step
    assert task.improvements[0] == 0 and task.improvements[-1] == run.best_step
    with (tmp_path / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "3", "6", "9", "12"]
    assert set(rows[0]) == {"step", "mean", "first", "second"}
    with (tmp_path / "log.csv").open() as file:
        (first, *_) = csv.DictReader(file)
    assert set(first) == {"step", "learning_rate", "loss", *task.terms, "norm"}


def test_it_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    task = Learning(rate=1e-3)
    nn.init.constant_(task.network.values, -5)
    run = trainer(task, tmp_path, patience=2)
    run.train()
    assert run.step == 2 * CONFIG.validate_every
    assert torch.equal(task.network.values, torch.full((1, 2, 4), -5.0)), "the best was the first"


def test_what_is_measured_nowhere_is_trained_to_the_end(tmp_path: Path) -> None:
    task = Learning()
    task.scripted = iter([{}] * 9)
    run = trainer(task, tmp_path, patience=1)
    run.train()
    assert run.step == 12 and run.best is None and task.network.values.any()


def test_a_gradient_that_is_no_number_does_not_reach_the_weights(tmp_path: Path) -> None:
    task = Learning()
    task.network.values.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UsageError, match="norm of its gradient nan: lower the learning rate"):
        trainer(task, tmp_path).train()
    assert torch.equal(task.network.values, torch.zeros(1, 2, 4))


@pytest.mark.parametrize("at", [1, 5, 11])
def test_an_interrupted_run_ends_as_the_unbroken_one(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = Learning()
    trainer(unbroken, tmp_path / "unbroken", ema=0.5).train()
    step = Trainer.train_step

    def broken(self: Trainer, batches: Any) -> None:
        if self.step == at:
            raise KeyboardInterrupt
        step(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", broken)
        with pytest.raises(KeyboardInterrupt):
            trainer(Learning(), tmp_path / "broken", ema=0.5).train()
    resumed = Learning()
    trainer(resumed, tmp_path / "broken", ema=0.5).train()
    assert torch.equal(resumed.network.values, unbroken.network.values)
    assert torch.equal(resumed.network.seen, unbroken.network.seen), "buffers are kept too"
    assert resumed.calls[0] == at - at % CONFIG.save_every
    names = ("log.csv", "validation.csv", "last/state.json", "last/ema.safetensors")
    for name in names:
        one, other = (tmp_path / run / name for run in ("unbroken", "broken"))
        assert one.read_bytes() == other.read_bytes(), name
    kept = json.loads((tmp_path / "broken" / "last" / "state.json").read_text())
    assert kept["identity"] == {"seed": 1}


def test_a_run_can_be_taken_in_parts(tmp_path: Path) -> None:
    whole, parts = Learning(), Learning()
    trainer(whole, tmp_path / "whole", restores_best=False).train()
    run = trainer(parts, tmp_path / "parts", restores_best=False)
    run.train(until=5)
    assert run.step == 5
    run.train()
    assert torch.equal(whole.network.values, parts.network.values)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer(Learning(), tmp_path).train()
    with pytest.raises(UsageError, match=r"other settings \(seed differ\)"):
        trainer(Learning(seed=2), tmp_path).train()
    with pytest.raises(UsageError, match="has done 12 steps, more than the 4 asked for"):
        trainer(Learning(), tmp_path, steps=4).train()


def test_the_rate_rises_and_falls() -> None:
    schedule = Schedule(ScheduleConfig("cosine_to_floor", 10), 100)
    shares = [schedule.share(step) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == pytest.approx(1, abs=0.03)
    assert shares[99] == pytest.approx(0.05, abs=0.01)


def test_a_file_gets_a_line_now_and_then_and_no_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, *range(1, 1000)])
    monkeypatch.setattr(logs.time, "monotonic", lambda: float(next(clock)))
    progress = logs.Progress("train", 0, 300, shown=True)
    for _ in range(300):
        progress.step()
        progress.show({"loss": 0.5, "norm": 1.0})
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 7
    assert lines[-1] == "train: step 300 of 300, loss 0.500"
    hidden = logs.Progress("train", 0, 1, shown=False)
    hidden.step()
    hidden.show({"loss": 0.5})
    assert not capsys.readouterr().err
