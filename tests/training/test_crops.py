"""Crops of stored scans: where they lie, and their voxels on another grid."""

import numpy as np
import pytest
import torch

from foundation.training.crops import crop_start, resample


def test_a_crop_is_moved_into_the_scan_or_centred_on_a_smaller_one() -> None:
    size, shape = np.array([4, 4, 20]), (10, 10, 10)
    assert crop_start(np.array([5.0, 5, 5]), size, shape).tolist() == [3, 3, -5]
    assert crop_start(np.array([0.0, 9, 9]), size, shape).tolist() == [0, 6, -5]


def test_volumes_of_the_right_size_stay_the_same() -> None:
    volumes = (torch.zeros(3, 4, 5), torch.ones(3, 4, 5).int(), torch.ones(3, 4, 5).bool())
    assert all(a is b for a, b in zip(volumes, resample(*volumes, (3, 4, 5)), strict=True))


def test_resampling_keeps_label_values_and_means() -> None:
    hu = torch.arange(8.0).reshape(8, 1, 1).expand(8, 8, 8)
    labels = (hu * 100).to(torch.int32)
    fine, values, inside = resample(hu, labels, labels >= 0, (16, 16, 16))
    assert float(fine.mean()) == pytest.approx(3.5) and fine.shape == (16, 16, 16)
    assert torch.equal(values[:, 0, 0], labels[:, 0, 0].repeat_interleave(2)) and inside.all()
    coarse, values, _ = resample(hu, labels, labels >= 0, (4, 4, 4))
    assert coarse[:, 0, 0].tolist() == [0.5, 2.5, 4.5, 6.5]
    assert set(values.flatten().tolist()) <= set(labels.flatten().tolist())
