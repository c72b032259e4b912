"""Smooth fields: of unit size, smooth, and enlarged as torch's own interpolation does."""

import pytest
import torch
from torch.nn import functional

from foundation.synthesis.fields import enlarge, smooth_noise


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
