"""Augmentation of real scans: the same for a scan and its labels, as often and as much as asked."""

import numpy as np
import pytest
import torch

from foundation.training import augment
from foundation.training.augment import (
    AugmentationConfig,
    draw_lattice,
    draw_zoom,
    nearest,
    rotate,
    shift,
)


def test_a_turn_is_in_the_axial_plane_and_the_same_for_all() -> None:
    volume = torch.arange(4 * 4 * 3).reshape(4, 4, 3)
    always = AugmentationConfig(rotate_probability=1)
    seen = set()
    for seed in range(30):
        turned = rotate(always, (volume, volume + 1, volume + 2), np.random.default_rng(seed))
        (quarters,) = [q for q in range(4) if torch.equal(torch.rot90(volume, q), turned[0])]
        assert torch.equal(turned[1], turned[0] + 1) and torch.equal(turned[2], turned[0] + 2)
        seen.add(quarters)
    assert seen == {1, 2, 3}
    oblong = torch.arange(4 * 2 * 3).reshape(4, 2, 3)
    turned = rotate(always, (oblong,) * 3, np.random.default_rng(0))[0]
    assert torch.equal(turned, oblong.flip(0, 1))


def test_how_often_and_how_much() -> None:
    rng, augmentation = np.random.default_rng(0), AugmentationConfig(zoom_probability=0.3)
    zooms = np.array([draw_zoom(augmentation, rng) for _ in range(2000)])
    assert (zooms > 1).mean() == pytest.approx(0.3, abs=0.04)
    assert zooms[zooms > 1].min() >= 1.3 and zooms.max() <= 1.5
    image = torch.full((2, 1, 1, 1), 0.5)
    shifted = torch.stack([shift(augmentation, image, rng).flatten() for _ in range(2000)])
    changed = shifted[:, 0] != 0.5
    assert float(changed.float().mean()) == pytest.approx(0.2, abs=0.04)
    assert float((shifted - 0.5).abs().max()) <= 0.1
    assert torch.equal(shifted[:, 0], shifted[:, 1])


def test_a_lattice_without_turn_or_stretch_is_the_middle_of_what_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(augment, "_TURN_RAD", (0.0, 0.0, 0.0))
    monkeypatch.setattr(augment, "_STRETCH", (0.0, 0.0))
    lattice = draw_lattice((12, 14, 16), np.array([8, 8, 8]), (8, 8, 8), np.random.default_rng(0))
    values = torch.arange(12 * 14 * 16).reshape(12, 14, 16)
    assert torch.equal(nearest(values, lattice), values[2:10, 3:11, 4:12])
