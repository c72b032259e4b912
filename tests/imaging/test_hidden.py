"""Voxels that a label map hides: what is written is read, and what is damaged is told."""

from pathlib import Path

import numpy as np
import pytest

from foundation.errors import VolumeError
from foundation.imaging.hidden import HiddenVoxels, read_hidden, write_hidden


def a_mask(seed: int = 0) -> np.ndarray:
    mask = np.zeros((11, 9, 21), bool)
    mask[2:8, 3:7, 4:17] = np.random.default_rng(seed).random((6, 4, 13)) > 0.5
    return mask


def test_what_is_written_is_read(tmp_path: Path) -> None:
    masks = {3: a_mask(), 17: a_mask(1)}
    start = (5, 0, 2)  # the masks are parts of a larger volume
    hidden = {value: HiddenVoxels.of(mask, start) for value, mask in masks.items()}
    write_hidden(tmp_path / "hidden.npz", hidden)  # type: ignore[arg-type]
    found = read_hidden(tmp_path / "hidden.npz")
    assert list(found) == [3, 17]
    for value, mask in masks.items():
        whole = np.zeros((20, 9, 30), bool)
        whole[0, 0, 0] = True
        found[value].add_to(whole)
        assert found[value].count == mask.sum() == whole.sum() - 1
        assert (whole[5:16, 0:9, 2:23] == mask).all() and whole[0, 0, 0]
    assert HiddenVoxels.of(np.zeros((3, 3, 3), bool), (0, 0, 0)) is None


def test_what_is_damaged_is_told(tmp_path: Path) -> None:
    path = tmp_path / "hidden.npz"
    hidden = HiddenVoxels.of(a_mask(), (0, 0, 0))
    assert hidden
    with pytest.raises(VolumeError, match="lie outside of their label map"):
        hidden.add_to(np.zeros((5, 5, 5), bool))
    with pytest.raises(VolumeError, match="no hidden voxels that can be read"):
        read_hidden(path)
    write_hidden(path, {1: hidden})
    content = path.read_bytes()
    whole = np.zeros((11, 9, 21), bool)
    hidden.add_to(whole)
    rng = np.random.default_rng(0)
    for _ in range(100):
        broken = bytearray(content)
        place = rng.integers(len(broken))
        broken[place] ^= 1 << rng.integers(8)
        path.write_bytes(broken if rng.random() < 0.8 else content[:place])
        try:
            found = read_hidden(path)
        except VolumeError:
            continue
        mask = np.zeros_like(whole)  # a flip that changes nothing, as in a date
        found[1].add_to(mask)
        assert list(found) == [1] and (mask == whole).all()
    for wrong in ({"1_bits": np.zeros((1, 1, 1), np.uint8)}, {"x_bits": np.zeros(3)}):
        np.savez(path, **wrong)  # type: ignore[arg-type]
        with pytest.raises(VolumeError, match="no hidden voxels that can be read"):
            read_hidden(path)
