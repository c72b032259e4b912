"""Voxels of the loss: what they are, what they should be, and how much they count."""

import numpy as np
import pytest
import torch

from foundation.training.sample import draw_truth, draw_voxels


def test_weighted_voxels_estimate_sums_over_all() -> None:
    labels = torch.zeros(20, 20, 20, dtype=torch.uint8)
    labels[5:15, 5:15, 5:15] = 3
    labels[9, 9, 8:12] = 7  # four voxels: a plain draw of 1,000 would hold half a voxel of them
    generator = torch.Generator().manual_seed(0)
    voxels, weight = draw_voxels(labels, 1000, generator)
    drawn = labels.reshape(-1)[voxels]
    assert (drawn == 7).sum() > 100
    estimated = {v: float(weight[drawn == v].sum()) * 8 for v in (0, 3, 7)}
    truth = {v: int((labels == v).sum()) for v in (0, 3, 7)}
    assert estimated == {v: pytest.approx(truth[v], rel=0.15) for v in truth}
    everything, ones = draw_voxels(labels, 8000, generator)
    assert everything.tolist() == list(range(8000)) and (ones == 1).all()


def test_the_truth_of_a_patch() -> None:
    labels = torch.tensor([0, 1, 2, 3, 1, 2]).reshape(1, 2, 3)
    known = torch.tensor([True] * 4 + [False] * 2).reshape(1, 2, 3)
    membership = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]], bool)
    annotated = np.array([True, False, True])
    truth = draw_truth(labels, known, membership, annotated, None, torch.Generator(), unknown=(3,))
    assert truth["voxels"].tolist() == list(range(6))
    assert truth["target"].int().tolist() == [[0, 1, 1, 0, 1, 1], [0] * 6, [0, 0, 0, 1, 0, 0]]
    assert truth["annotated"].tolist() == [True, False, True]
    assert truth["weight"].tolist() == [1, 1, 1, 0, 0, 0]
