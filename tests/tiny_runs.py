"""Runs of a second, and what they leave, for tests of the pretraining engine."""

import csv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from foundation.pretraining.run import pretrain

TENSORS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def go(config: dict[str, Any], run: Path, *overrides: str) -> Path:
    return pretrain(config, output=run, overrides=overrides, cpu=True, progress=False)


def state(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        for name in TENSORS
        for key, value in load_file(run / "last" / name).items()
    }


def assert_same_run(one: Path, other: Path) -> None:
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    for name in ("last/state.json", "log.csv", "model/model.safetensors", "config.yaml"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def assert_same_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """After one step the first moment is a tenth of the gradient; the weights show but its sign."""
    moments = [key for key in one if key.endswith("|exp_avg")]
    largest = max(float(one[key].abs().max()) for key in moments)
    assert moments and largest > 0
    for key in moments:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-5 * largest, msg=key)
