"""A checkpoint on disk: what was saved, or an error that says it is not."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from damage import damage

from foundation.errors import WeightsError
from foundation.files import read_sealed
from foundation.training import checkpoints
from foundation.training.checkpoints import AVERAGE, BEST, NETWORK, OPTIMIZER, STATE, Checkpoint

KINDS = (NETWORK, AVERAGE, OPTIMIZER, BEST, STATE)


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(5, 3, generator=generator) for name in ("a", "b")}


def checkpoint() -> Checkpoint:
    progress = {"step": 7, "best": -float("inf"), "identity": {"data": "x"}, "scaler": None}
    return Checkpoint(values(0), values(1), values(2), progress, values(3))


def equal(one: Checkpoint, other: Checkpoint) -> bool:
    def parts(each: Checkpoint) -> list[dict[str, torch.Tensor]]:
        found = (each.network, each.average, each.optimizer, each.best)
        return [dict(part or {}) for part in found]

    return one.progress == other.progress and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(parts(one), parts(other), strict=True)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoints.save(tmp_path / "last", checkpoint())
    return tmp_path / "last"


def test_a_checkpoint_is_what_was_saved(folder: Path) -> None:
    assert equal(checkpoints.load(folder), checkpoint())
    assert set(read_sealed((folder / STATE).read_text())["files"]) == {*KINDS} - {STATE}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "gone"])
def test_damage_is_refused(folder: Path, name: str, how: str) -> None:
    path = folder / name
    if how == "gone":
        path.unlink()
    elif how == "flipped" and name != STATE:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # the last value: without a sum it would be another weight
        path.write_bytes(content)
    else:
        damage(path, how, random.Random(0))
    with pytest.raises(WeightsError, match=r"last cannot be read: .*Remove it to start again"):
        checkpoints.load(folder)


def test_another_step_is_refused(folder: Path) -> None:
    path = folder / STATE
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    with pytest.raises(WeightsError, match="its values are not those that it was written with"):
        checkpoints.load(folder)


def test_a_checkpoint_without_sums_is_read(folder: Path) -> None:
    progress = read_sealed((folder / STATE).read_text())
    del progress["files"]
    (folder / STATE).write_text(json.dumps(progress))
    assert equal(checkpoints.load(folder), checkpoint())


@pytest.mark.slow
def test_two_hundred_damaged_checkpoints(folder: Path, tmp_path: Path) -> None:
    """Each is refused, or is exactly what was saved."""
    refused = 0
    for seed in range(200):
        rng = random.Random(seed)
        target = tmp_path / "copy"
        shutil.copytree(folder, target)
        damage(target / KINDS[seed % 5], rng.choice(["flipped", "flipped", "cut", "emptied"]), rng)
        try:
            assert equal(checkpoints.load(target), checkpoint()), seed
        except WeightsError:
            refused += 1
        shutil.rmtree(target)
    assert refused > 190
