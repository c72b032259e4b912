"""The numbered samples of a run: what they depend on, and how batches are made of them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_store import SPACING_MM, write_store

from foundation.data.store.arrays import Store
from foundation.taxonomy import NAMES
from foundation.training.mixture import (
    ECHO_APART,
    Mixture,
    NumberedSample,
    Steps,
    batch_numbers,
    batches,
    echoed,
)
from foundation.training.sample import PatchGrid
from foundation.training.sources import ScansConfig, SourceData
from foundation.training.sources.phantoms import Phantoms

GRID = PatchGrid((16,) * 3, SPACING_MM, ((-175.0, 250.0),), 500, ("liver", "spleen"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    store = Store(write_store(tmp_path_factory.mktemp("store")))
    return Mixture(ScansConfig().build(SourceData(store, frozenset(), 0)), seed=5)


def test_a_sample_depends_on_seed_and_number_alone(mixture: Mixture) -> None:
    second, other = Mixture(mixture.sources, seed=5), Mixture(mixture.sources, seed=6)
    for number in (9, 3, 7):
        one, same = mixture.sample(number, GRID), second.sample(number, GRID)
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(same[k])) for k in one)
        assert not torch.equal(one["image"], other.sample(number, GRID)["image"])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_numbers_in_order(processes: int) -> None:
    parts = [batch_numbers(100, 4, 2, rank, processes) for rank in range(processes)]
    together = [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]
    assert together == [list(batch) for batch in batch_numbers(100, 4, 2 * processes, 0, 1)]


def numbers_seen(first_step: int) -> list[tuple[int, float]]:
    """Numbers and spacings of the samples of a run from a step on."""
    seen: list[tuple[int, float]] = []

    class Recorder:
        def sample(self, number: int, grid: PatchGrid) -> dict[str, torch.Tensor]:
            seen.append((number, grid.spacing_mm))
            return {"image": torch.zeros(1)}

    coarse = Steps(2, Recorder(), replace(GRID, spacing_mm=8.0), 2, accumulation=3)
    fine = Steps(4, Recorder(), replace(GRID, spacing_mm=4.0), 2)
    list(batches([coarse, fine], first_step=first_step))
    return seen


def test_stages_follow_each_other() -> None:
    seen = numbers_seen(0)
    assert [number for number, _ in seen] == list(range(2 * 3 * 2 + 4 * 2))
    assert [spacing for _, spacing in seen] == [8.0] * 12 + [4.0] * 8


@pytest.mark.parametrize("step", range(7))
def test_a_resume_goes_on_with_the_next_number(step: int) -> None:
    done = 6 * min(step, 2) + 2 * max(0, step - 2)
    assert numbers_seen(step) == numbers_seen(0)[done:]


@pytest.mark.slow
def test_workers_change_nothing(mixture: Mixture) -> None:
    stages = [Steps(4, mixture, GRID, 2)]
    found = []
    for workers in (0, 2):
        made = batches(stages, first_step=1, workers=workers)
        found.append(list(itertools.islice(made, 3)))
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("echo", [1, 2, 3])
def test_each_sample_is_given_so_often_and_never_soon_again(echo: int) -> None:
    numbers = 5 * ECHO_APART * echo
    drawn = [echoed(number, echo) for number in range(numbers)]
    places: dict[int, list[int]] = {}
    for number, sample in enumerate(drawn):
        places.setdefault(sample, []).append(number)
    assert sorted(places) == list(range(5 * ECHO_APART)), "none is left out"
    assert all(np.diff(found).tolist() == [ECHO_APART] * (echo - 1) for found in places.values())


@pytest.mark.slow
def test_echoes_are_the_same_samples_and_are_drawn_once() -> None:
    made: list[int] = []

    class Counting(Mixture):
        def sample(self, number: int, grid: PatchGrid) -> NumberedSample:
            made.append(number)
            return super().sample(number, grid)

    mixture = Counting([Phantoms("phantoms", 1, 1, 3)], seed=5)
    tiny = PatchGrid((8,) * 3, 1.5, ((-175.0, 250.0),), 32, NAMES)
    stages = [Steps(3 * ECHO_APART, mixture, tiny, 1)]
    images = [each["image"] for each in batches(stages, first_step=0, echo=2)]
    assert made == list(range(2 * ECHO_APART)), "the last block is given once"
    assert torch.equal(images[3], images[3 + ECHO_APART])
    assert not torch.equal(images[3], images[4])
    resumed = batches(stages, first_step=ECHO_APART + 3, echo=2)
    assert torch.equal(next(resumed)["image"], images[ECHO_APART + 3])
