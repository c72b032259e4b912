"""Deformation: smooth, without folds, and exact where nothing is drawn."""

import numpy as np
import pytest
import torch
from anatomies import ball

from foundation.synthesis.anatomy import FINE_MM
from foundation.synthesis.deform import apply_bump, draw_positions, gather, majority


class Still:
    """A random generator whose every draw is its mean: nothing is deformed or shifted."""

    def normal(self, mean: float = 0.0, sd: object = 1.0, size: int | None = None) -> object:
        shape = np.broadcast(np.empty(() if size is None else size), np.asarray(sd)).shape
        return np.full(shape, mean) if shape else mean

    def uniform(self, low: float, high: float) -> float:
        return 0.0


def test_a_bump_magnifies_or_shrinks_and_never_folds() -> None:
    line = torch.arange(40, dtype=torch.float32)
    for amount in (-0.8, 0.72):
        positions = torch.stack(torch.meshgrid(line, line, line, indexing="ij"))
        apply_bump(positions, np.full(3, 20.0), 6.0, amount)
        assert positions[:, 20, 20, 20].tolist() == [20, 20, 20]
        assert (positions[0].diff(dim=0) > 0).all()
        step = float(positions[0, 21, 20, 20] - positions[0, 20, 20, 20])
        assert (step < 0.5) if amount > 0 else (step > 1.5)  # fewer source voxels a step: larger
        assert positions[:, 0, 0, 0].abs().max() < 0.1


def test_gather_takes_the_nearest_voxel_and_fills_outside() -> None:
    volume = torch.arange(4 * 5 * 6, dtype=torch.float32).view(4, 5, 6)
    line = [torch.arange(n, dtype=torch.float32) for n in volume.shape]
    grid = torch.stack(torch.meshgrid(*line, indexing="ij"))
    assert torch.equal(gather(volume, grid, fill=-1), volume)
    for shift in (0.4, -0.4):
        assert torch.equal(gather(volume, grid + shift, fill=-1), volume)
    step = torch.tensor([1.0, -1.0, 0.0])[:, None, None, None]
    moved = gather(volume, grid + step, fill=-1)
    assert torch.equal(moved[:-1, 1:], volume[1:, :-1])
    assert (moved[-1] == -1).all() and (moved[:, 0] == -1).all()


def test_majority_of_fine_labels() -> None:
    fine = torch.zeros(4, 2, 2, dtype=torch.uint8)
    fine[0] = 5  # 4 of 8: a tie
    fine[1, 0, 0] = 5  # now 5 of 8
    fine[2, 1, 1] = 9  # 1 of 8
    assert majority(fine, 2).flatten().tolist() == [5, 0]
    assert majority(fine, 1) is fine


def test_an_undeformed_patch_is_a_crop_around_its_centre() -> None:
    shape = (40, 40, 40)
    centre = np.array([22.5, 17.5, 20.5])
    volume = torch.from_numpy(ball(shape, tuple(centre), 8)).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    positions = draw_positions(10, 2, 4.0, centre, (), Still(), generator)
    fine = gather(volume, positions, fill=0)
    assert torch.equal(fine, volume[13:33, 8:28, 11:31])
    coarse = majority(fine, 2)
    middle = coarse.nonzero().double().mean(0)
    assert middle.tolist() == pytest.approx([4.5, 4.5, 4.5])
    volume_mm3 = int(coarse.sum()) * 4.0**3
    assert volume_mm3 == pytest.approx(4 / 3 * np.pi * (8 * FINE_MM) ** 3, rel=0.1)


def test_deformation_is_a_smooth_change_of_place_and_size() -> None:
    spread = []
    for seed in range(10):
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        positions = draw_positions(32, 1, 2.0, np.full(3, 50.0), (), rng, generator)
        steps = positions.diff(dim=1).norm(dim=0)
        smallest, largest = float(steps.min()), float(steps.max())
        assert smallest > 0.3 and largest < 2.5  # no folds, no tears
        spread.append(float(steps.mean()))
        assert (positions.flatten(1).mean(1) - 50).abs().max() < 8
    assert 0.7 < min(spread) < max(spread) < 1.4
    assert max(spread) - min(spread) > 0.1
