"""Packed masks: an eighth of the bytes, and the same mask again."""

import numpy as np

from foundation.imaging.bits import pack, unpack


def test_a_mask_is_packed_and_unpacked() -> None:
    mask = np.random.default_rng(0).random((5, 4, 19)) < 0.4
    bits = pack(mask)
    assert bits.shape == (5, 4, 3)
    np.testing.assert_array_equal(unpack(bits, 19), mask)
    np.testing.assert_array_equal(unpack(bits[1:3], 19), mask[1:3])
