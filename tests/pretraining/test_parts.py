"""Schedule, average, learning rates by depth, losses and logs of the pretraining engine."""

import csv
from math import cos, pi
from pathlib import Path

import pytest
import torch
from tiny_store import tiny_config
from torch import nn

from foundation.networks.backbones import build_backbone
from foundation.pretraining.network import build_network, learning_rates
from foundation.pretraining.reading import load_config
from foundation.taxonomy import CLASSES
from foundation.training.depth import (
    checkpoint_activations,
    in_order_of_use,
    rate_factors,
    stages,
)
from foundation.training.ema import Average
from foundation.training.logs import Table, Tally
from foundation.training.losses import EXCLUSIVE, published_losses, scan_losses
from foundation.training.schedule import Schedule, ScheduleConfig, build_adamw

K = len(CLASSES)
TINY = {"widths": [16, 16, 16], "full": 16}


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [{"params": [nn.Parameter(torch.zeros(1))], "lr": r, "initial_lr": r} for r in rates]
    )


def rates_of(config: ScheduleConfig, steps: int, *full: float) -> list[list[float]]:
    adam = optimizer(*full)
    schedule = Schedule(config, steps)
    found = []
    for step in range(steps):
        schedule.apply(adam, step)
        found.append([group["lr"] for group in adam.param_groups])
    return found


# --- schedule -------------------------------------------------------------------------------------


def test_the_cosine_is_timms() -> None:
    from timm.scheduler import CosineLRScheduler

    steps, warm_up, full = 40, 8, 0.3
    reference_adam = optimizer(full)
    reference = CosineLRScheduler(
        reference_adam, t_initial=32, warmup_t=warm_up, warmup_prefix=True, t_in_epochs=False
    )
    config = ScheduleConfig("cosine", warm_up)
    for step, (rate, smaller) in enumerate(rates_of(config, steps, full, full / 10)):
        reference.step_update(step)
        assert rate == pytest.approx(reference_adam.param_groups[0]["lr"])
        assert smaller == pytest.approx(rate / 10)
        if step < warm_up:
            assert rate == pytest.approx(full * step / warm_up)
        else:
            assert rate == pytest.approx(full * (1 + cos(pi * (step - warm_up) / 32)) / 2)


def test_the_trapezoid_rises_stays_and_falls() -> None:
    rates = [r for (r,) in rates_of(ScheduleConfig("trapezoid", 4, 0.5), 20, 2.0)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:11] == [2.0] * 7
    assert rates[11:] == pytest.approx([0.2 * left for left in range(9, 0, -1)])


@pytest.mark.parametrize("kind", ["cosine", "trapezoid"])
def test_what_declines_is_whole_in_the_warm_up(kind: str) -> None:
    adam, schedule = optimizer(0.1, 0.2), Schedule(ScheduleConfig(kind, 5, 0.5), 20)
    declines = [schedule.decline(step) for step in range(20)]
    assert declines[:6] == [1.0] * 6
    assert declines == sorted(declines, reverse=True) and 0 < declines[-1] < 0.2
    # A rate set for a step does not depend on what was asked in between.
    schedule.apply(adam, 3)
    before = [group["lr"] for group in adam.param_groups]
    schedule.decline(15)
    schedule.apply(adam, 3)
    assert [group["lr"] for group in adam.param_groups] == before


# --- average --------------------------------------------------------------------------------------


def test_the_average_has_a_short_memory_at_first() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.register_buffer("count", torch.tensor(0))
    nn.init.constant_(module.weight, 1.0)
    average = Average(module, decay=0.5)
    expected = 1.0
    for step, value in enumerate((2.0, 4.0, -3.0, 8.0, 1.0, 0.0, 5.0, 5.0, 5.0, 5.0)):
        nn.init.constant_(module.weight, value)
        module.count.fill_(step)
        average.update(module, step)
        decay = min(0.5, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * value
        assert float(average.values["weight"]) == pytest.approx(expected)
        assert int(average.values["count"]) == step


# --- depth ----------------------------------------------------------------------------------------


def test_stages_cover_the_backbone_in_the_order_of_use() -> None:
    backbone = build_backbone("lite_unet", 1, **TINY)
    order = in_order_of_use(backbone, 1)
    assert order[:3] == ["down.0", "down.1", "down.2"]
    assert order[4:6] == ["up.1", "merge.1"] and order[-1] == "full_up"
    assert set(order) == set(stages(backbone))
    inside = sum(p.numel() for module in stages(backbone).values() for p in module.parameters())
    assert inside == sum(p.numel() for p in backbone.parameters())
    assert not any("forward" in vars(module) for module in backbone.modules())


def test_layer_wise_decay() -> None:
    backbone = build_backbone("lite_unet", 1, **TINY)
    order = in_order_of_use(backbone, 1)
    factors = rate_factors(backbone, 1, 0.5)
    assert set(factors) == {name for name, _ in backbone.named_parameters()}
    for name, factor in factors.items():
        place = next(i for i, stage in enumerate(order) if name.startswith(f"{stage}."))
        assert factor == 0.5 ** (len(order) - place)
    assert set(rate_factors(backbone, 1, 1.0).values()) == {1.0}


def test_rates_of_head_backbone_and_classifier() -> None:
    rates = {"learning_rate": 1e-2, "head_learning_rate": 1e-3, "layer_decay": 0.5}
    config = load_config(tiny_config(optimizer=rates))
    network = build_network(config)
    found = learning_rates(network, config.optimizer)
    assert found["model.head.controller.weight"] == 1e-3
    assert found["model.head.text_projection.bias"] == 1e-3
    assert found["model.head.feature_projection.2.weight"] == 1e-2
    assert found["auxiliary.weight"] == 1e-2
    assert found["model.backbone.full_up.weight"] == 1e-2 / 2
    assert found["model.backbone.down.0.0.0.weight"] < found["model.backbone.down.1.0.0.weight"]
    adam = build_adamw(network, found)
    names = {parameter: name for name, parameter in network.named_parameters()}
    grouped = [(names[p], g["lr"]) for g in adam.param_groups for p in g["params"]]
    assert dict(grouped) == found and len(grouped) == len(found)


def test_checkpointed_activations_change_no_gradient() -> None:
    gradients = []
    for checkpointed in (False, True):
        config = load_config(tiny_config(checkpoint_activations=checkpointed))
        network = build_network(config)
        image = torch.rand(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        logits, helping = network(image, torch.arange(500)[None])
        (logits.square().mean() + helping.square().mean()).backward()
        gradients.append({n: p.grad for n, p in network.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_checkpointing_computes_a_stage_again() -> None:
    backbone = build_backbone("lite_unet", 1, **TINY)
    calls = []
    backbone.down[0].register_forward_hook(lambda *_: calls.append(1))
    convolution = backbone.down[0][0]
    convolution.register_forward_hook(lambda *_: calls.append("inner"))
    checkpoint_activations(backbone)
    image = torch.rand(1, 1, 16, 16, 16, requires_grad=True)
    backbone.decode(backbone.encode(image)).sum().backward()
    assert calls.count("inner") == 2


# --- losses ---------------------------------------------------------------------------------------


def batch(scans: int = 3, voxels: int = 50) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(scans, K, voxels, generator=generator, requires_grad=True)
    target = torch.rand(scans, K, voxels, generator=generator) < 0.1
    annotated = torch.rand(scans, K, generator=generator) < 0.5
    weight = (torch.rand(scans, voxels, generator=generator) < 0.7).float()
    return logits, target, annotated, weight


def test_the_published_losses_by_hand() -> None:
    logits, target, annotated, weight = batch()
    terms = published_losses(logits, target, annotated, weight)
    for scan in range(3):
        dice, binary = [], []
        for channel in range(K):
            if not annotated[scan, channel]:
                continue
            w, t = weight[scan], target[scan, channel].float()
            p = logits[scan, channel].sigmoid()
            entropy = -(t * p.log() + (1 - t) * (1 - p).log())
            binary.append((entropy * w).sum() / w.sum())
            if (t * w).sum() > 0:
                dice.append(1 - (2 * (p * t * w).sum() + 1) / ((p * w).sum() + (t * w).sum() + 1))
        assert terms["dice"][scan].item() == pytest.approx((sum(dice) / len(dice)).item(), rel=1e-5)
        assert terms["binary"][scan].item() == pytest.approx(
            (sum(binary) / len(binary)).item(), rel=1e-5
        )


@pytest.mark.parametrize("losses", [published_losses, scan_losses])
def test_what_is_not_annotated_gets_exactly_no_gradient(losses) -> None:
    logits, target, annotated, weight = batch()
    annotated[1] = False
    sum(values.sum() for values in losses(logits, target, annotated, weight).values()).backward()
    assert not logits.grad[~annotated].any()
    assert (logits.grad[annotated].abs().sum(1) > 0).all()


def test_an_absent_class_has_no_gradient_from_dice() -> None:
    logits, target, annotated, weight = batch(1)
    target[0, 0] = False
    annotated[0, :2] = True
    published_losses(logits, target, annotated, weight)["dice"].sum().backward()
    assert not logits.grad[0, 0].any() and logits.grad[0, 1].any()


def test_exclusive_classes_can_be_chosen() -> None:
    logits, target, annotated, weight = batch()
    none = scan_losses(
        logits, target, annotated, weight, exclusive=torch.zeros(K, dtype=torch.bool)
    )
    assert not none["exclusive"].any()
    torch.testing.assert_close(
        none["dice"], published_losses(logits, target, annotated, weight)["dice"]
    )
    ours = scan_losses(logits, target, annotated, weight, exclusive=EXCLUSIVE)
    assert (ours["exclusive"] > 0).all()


# --- logs -----------------------------------------------------------------------------------------


def test_a_row_holds_means_by_term_and_by_source() -> None:
    tally = Tally(["dice", "binary"], ["scans", "phantoms", "rest"], torch.device("cpu"))
    terms = {"dice": torch.tensor([1.0, 3.0]), "binary": torch.tensor([0.0, 4.0])}
    tally.add_losses(terms, torch.tensor([0, 1]))
    tally.add_losses({name: torch.ones(1) for name in terms}, torch.tensor([1]))
    tally.add_norm(torch.tensor(6.0))
    row = tally.row(tally.sums)
    assert row["dice"] == pytest.approx(5 / 3) and row["binary"] == pytest.approx(5 / 3)
    assert row["loss"] == pytest.approx(10 / 3) and row["norm"] == 6.0
    assert row["loss/scans"] == 1.0 and row["loss/phantoms"] == 4.5
    assert row["loss/rest"] is None
    tally.clear()
    assert tally.row(tally.sums)["loss/scans"] is None


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    table = Table(tmp_path / "log.csv", ["loss", "other"])
    for step in (1, 2, 3, 4):
        table.append(step, {"loss": step / 2, "other": None})
    with (tmp_path / "log.csv").open("a") as file:
        file.write("5,0.")  # cut off by a kill
    table.continue_from(2)
    table.append(3, {"loss": 9.0, "other": 1.0})
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"]) for row in rows] == [("1", "0.5"), ("2", "1"), ("3", "9")]
