"""What networks cost, against counts by hand."""

import os

import pytest
import torch
from benchmark_scripts import script
from torch import nn

from foundation import BACKBONES, CLASSES

costs = script("costs")
figure7 = script("figure7_efficiency")
pretraining_cost = script("pretraining_cost")
table8 = script("table8_backbones")


def test_a_convolution_is_counted_as_by_hand() -> None:
    convolution = nn.Conv3d(2, 5, 3, padding=1)
    assert costs.parameters(convolution) == 5 * (2 * 27 + 1)
    multiply_adds = 8 * 6 * 4 * 5 * 2 * 27  # voxels × outputs × inputs × weights of a kernel
    assert costs.flops(convolution, (8, 6, 4), channels=2) == 2 * multiply_adds


def test_a_window_of_twice_the_side_costs_eight_times_as_much() -> None:
    small, large = (
        costs.flops(costs.universal_model("unet", ["liver"], (side,) * 3), (side,) * 3)
        for side in (48, 96)
    )
    assert large / small == pytest.approx(8, rel=1e-3), "all but the head's few layers"


def test_windows_cover_a_scan() -> None:
    assert costs.windows((96, 96, 96), (96, 96, 96), 0.5) == 1
    assert costs.windows((97, 96, 50), (96, 96, 96), 0.5) == 2
    assert costs.windows((192, 144, 96), (96, 96, 96), 0.5) == 3 * 2
    assert costs.windows((192, 192, 192), (96, 96, 96), 0.0) == 8


def test_repeats_become_a_median_between_their_ends() -> None:
    figure = costs.spread("seconds", [3.0, 1.0, 2.0, 9.0])
    assert (figure.value, figure.low, figure.high, figure.n) == (2.5, 1.0, 9.0, 4)
    calls: list[int] = []
    assert len(costs.seconds_of(lambda: calls.append(1), 3, torch.device("cpu"))) == 3
    assert len(calls) == 4, "the first call is not counted"


@pytest.mark.slow
def test_memory_is_what_was_taken_since() -> None:
    memory = costs.Memory(torch.device("cpu"))
    if memory.before is None:
        pytest.skip("this system does not tell")
    held = torch.ones(1 << 28, dtype=torch.uint8)
    figure = memory.figure()
    assert figure.value >= 0.24 and figure.unit == "GiB" and held.sum() > 0


def test_a_process_of_its_own_unless_several_train_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert costs.alone(os.getpid) != os.getpid()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert costs.alone(os.getpid) == os.getpid()


def test_six_networks_are_those_of_the_six_tasks() -> None:
    found = figure7.networks(figure7.SIX, "segresnet", 32)
    assert sum(times for times, _ in found) == len(figure7.TASKS) == 6
    assert sorted((times, len(network.classes)) for times, network in found) == [(3, 1), (3, 2)]
    ((one, universal),) = figure7.networks(figure7.ONE, "segresnet", 32)
    assert one == 1 and len(universal.classes) == len(CLASSES)
    alike = {costs.parameters(network.backbone) for _, network in found}
    assert alike == {costs.parameters(universal.backbone)}


def test_projected_hours_are_those_of_all_patches_on_one_device() -> None:
    # 100 steps of 6 patches on 8 devices: 4,800 patches; 2 a step of 3 s are 7,200 s.
    assert pretraining_cost.projected_hours(3.0, batch=2, steps=100) == pytest.approx(2.0)


def test_every_backbone_has_widths_to_be_compared_at_one_cost() -> None:
    assert table8.NARROW.keys() == BACKBONES.keys()
    assert len(table8.MEASURED) == 25 + 6


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["unet", "segresnet"])
def test_the_width_is_the_one_whose_cost_is_nearest(backbone: str) -> None:
    patch = (64, 32, 32)
    target = table8.cost_of("mednext", patch, {"width": 16})
    chosen = table8.options_of_cost(backbone, patch, target)
    away = {
        str(options): abs(table8.cost_of(backbone, patch, options) - target)
        for options, _ in zip(table8.NARROW[backbone](), range(8), strict=False)
    }
    assert away[str(chosen)] == min(away.values()) < 0.2 * target
