"""Smooth fields: of unit size, smooth, and enlarged as torch's own interpolation does."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from foundation.synthesis.fields import enlarge, one_of, rotation, smooth_noise


def test_smooth_noise_is_of_unit_size_and_smooth() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = smooth_noise((40, 40, 40), 8.0, generator)
    assert float(noise.std()) == pytest.approx(1, abs=1e-4)
    neighbours = torch.corrcoef(torch.stack([noise[1:].flatten(), noise[:-1].flatten()]))[0, 1]
    assert neighbours > 0.9
    repeated = smooth_noise((40, 40, 40), 8.0, generator, repeat=2)
    assert (repeated[::2] == repeated[1::2]).all()


@pytest.mark.parametrize("size", [(9, 20, 31), (5, 4, 3), (96, 96, 96)])
def test_enlarging_is_trilinear_with_equal_corners(size: tuple[int, int, int]) -> None:
    small = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(1))
    expected = functional.interpolate(small[None], size=size, mode="trilinear", align_corners=True)
    assert torch.allclose(enlarge(small, size), expected[0], atol=1e-5)


def test_one_of_is_isin() -> None:
    labels = torch.arange(512, dtype=torch.int32).reshape(8, 8, 8)
    for values in ([], [0], [3, 255, 260, 511]):
        assert torch.equal(one_of(labels, values), torch.isin(labels, torch.tensor(values)))


def test_rotations_turn_from_axis_to_axis_in_order() -> None:
    quarter = np.pi / 2
    x, y, z = np.eye(3)
    for angles, start, end in (
        ((quarter, 0, 0), y, z),
        ((0, quarter, 0), x, z),
        ((0, 0, quarter), x, y),
    ):
        np.testing.assert_allclose(rotation(angles) @ start, end, atol=1e-12)
    both = (quarter, 0, quarter)
    np.testing.assert_allclose(rotation(both) @ x, z, atol=1e-12)  # about Z first
    np.testing.assert_allclose(rotation(both, order=(2, 1, 0)) @ x, y, atol=1e-12)  # about X first
