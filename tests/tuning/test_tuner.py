"""The loop of a tuning: what it minimises, when it stops, and that a kill costs nothing."""

from dataclasses import replace
from functools import partial
from math import log
from pathlib import Path

import pytest
import torch
from foundation.tuning.tuner import Parameters, Tuner, rate_share
from torch import Tensor, nn

from foundation.errors import UsageError
from foundation.tuning.methods import METHODS, get_method
from foundation.tuning.objective import Forward, distillation, tuning_losses

ALL = torch.ones(2, dtype=torch.bool)
LOSSES = partial(tuning_losses, exclusive=ALL, distil=1.0)


def forward(logits: Tensor, taught: Tensor | None = None, known: bool = True) -> Forward:
    """Two classes, four voxels; the second class is labelled, the first only if `known`."""
    target = torch.tensor([[[1, 0, 0, 0], [0, 1, 1, 0]]]).bool()
    return Forward(logits, target, torch.tensor([[known, True]]), torch.ones(1, 4), taught)


def test_distillation_is_zero_where_both_agree_and_grows_with_the_difference() -> None:
    taught = torch.tensor([[[3.0, -3.0, 0.0, 1.0]]])
    same = forward(torch.cat([taught, torch.zeros(1, 1, 4)], 1), taught, known=False)
    assert float(distillation(same)) == pytest.approx(0, abs=1e-6)
    logits = torch.cat([taught, torch.zeros(1, 1, 4)], 1)
    logits[0, 0, 2] = log(3)  # the old model says 1/2, the new one 3/4
    expected = (log(2) - 0.5 * log(3)) / 4  # the divergence of (1/2, 1/2) from (3/4, 1/4)
    assert float(distillation(forward(logits, taught, known=False))) == pytest.approx(expected)


def test_the_old_model_is_not_asked_about_what_the_scan_labels() -> None:
    taught = torch.full((1, 1, 4), 5.0)
    logits = torch.zeros(1, 2, 4, requires_grad=True)
    assert float(distillation(forward(logits.detach(), taught, known=True))) == 0
    unknown = forward(logits, taught, known=False)
    tuning_losses(unknown, 0.0, exclusive=ALL, distil=0.0)["binary"].backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].abs().sum() == 0, "masked"
    logits.grad = None
    tuning_losses(unknown, 0.0, exclusive=ALL, distil=1.0)["distil"].backward()
    assert logits.grad is not None
    assert (logits.grad[0, 0] < 0).all() and logits.grad[0, 1].abs().sum() == 0


class Logits(nn.Module):
    """The logits themselves as parameters: what a network could at best learn."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(1, 2, 4))
        self.calls: list[int] = []

    def feed(self, step: int) -> Forward:
        self.calls.append(step)
        noise = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(step))
        return forward(self.values + 0.1 * noise)

    def dice(self) -> dict[str, float]:
        said, truth = self.values.detach()[0] > 0, forward(self.values).target[0]
        both = (said & truth).sum(1) * 2 / (said.sum(1) + truth.sum(1))
        return {"first": float(both[0]), "second": float(both[1])}


METHOD = replace(
    METHODS["full"], steps=12, validate_every=3, patience=9, save_every=2, learning_rate=0.1
)


def tuner(module: Logits, folder: Path, seed: int = 1, **changes: float) -> Tuner:
    method = replace(METHOD, **changes)  # type: ignore[arg-type]
    parameters = Parameters({"values": module.values}, {"values": method.learning_rate})
    return Tuner(
        *(module, parameters, module.feed, LOSSES, method, module.dice, folder, {"seed": seed}),
        progress=False,
    )


def test_it_learns_and_leaves_its_best_state(tmp_path: Path) -> None:
    module = Logits()
    run = tuner(module, tmp_path)
    run.train()
    assert module.dice() == {"first": 1.0, "second": 1.0}
    assert run.best == 1.0 and run.best_step <= run.step
    assert (tmp_path / "log.csv").is_file() and (tmp_path / "validation.csv").is_file()


def test_it_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    module = Logits()
    nn.init.constant_(module.values, -5)
    run = tuner(module, tmp_path, learning_rate=1e-3, patience=2)
    run.train()
    assert run.step == 2 * METHOD.validate_every
    assert torch.equal(module.values, torch.full((1, 2, 4), -5.0)), "the best state was the first"


def test_a_gradient_that_is_no_number_does_not_reach_the_weights(tmp_path: Path) -> None:
    module = Logits()
    module.values.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UsageError, match="norm of its gradient nan: lower the learning rate"):
        tuner(module, tmp_path).train()
    assert torch.equal(module.values, torch.zeros(1, 2, 4))


@pytest.mark.parametrize("at", [1, 5, 11])
def test_an_interrupted_tuning_ends_as_the_unbroken_one(at: int, tmp_path: Path) -> None:
    unbroken = Logits()
    tuner(unbroken, tmp_path / "unbroken").train()

    class Broken(Logits):
        def feed(self, step: int) -> Forward:
            if step == at:
                raise KeyboardInterrupt
            return super().feed(step)

    with pytest.raises(KeyboardInterrupt):
        tuner(Broken(), tmp_path / "broken").train()
    resumed = Logits()
    tuner(resumed, tmp_path / "broken").train()
    assert torch.equal(resumed.values, unbroken.values)
    assert resumed.calls[0] == at - at % METHOD.save_every
    for name in ("log.csv", "validation.csv"):
        one, other = (tmp_path / run / name for run in ("unbroken", "broken"))
        assert one.read_bytes() == other.read_bytes()


def test_a_folder_of_another_tuning_is_refused(tmp_path: Path) -> None:
    tuner(Logits(), tmp_path).train()
    with pytest.raises(UsageError, match="seed differ"):
        tuner(Logits(), tmp_path, seed=2).train()


def test_the_rate_rises_and_falls() -> None:
    method = replace(METHOD, steps=100, warm_up=10)
    shares = [rate_share(step, method) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == pytest.approx(1, abs=0.03)
    assert shares[99] == pytest.approx(0.05, abs=0.01)


def test_methods_are_named_and_checked() -> None:
    assert get_method("lora", rank=4, steps=None).rank == 4
    with pytest.raises(UsageError, match=r"Unknown method 'lorra'. Choose one of head"):
        get_method("lorra")
    with pytest.raises(UsageError, match="Unknown setting 'ranks'"):
        get_method("lora", ranks=4)
    with pytest.raises(UsageError, match="steps is 0"):
        get_method("full", steps=0)
