"""Views of anatomies: what is drawn before they are rendered."""

import numpy as np
import torch

from foundation.synthesis import view


def test_a_removed_organ_becomes_fat() -> None:
    names = {1: "fat", 2: "gallbladder", 3: "spleen", 4: "liver"}
    for seed in range(40):
        labels = torch.arange(5, dtype=torch.uint8).repeat(3)
        view._remove_organ(labels, names, np.random.default_rng(seed), probability=1.0)
        assert {0, 1, 4} <= set(labels.tolist())
        gone = {2, 3} - set(labels.tolist())
        assert len(gone) <= 1 and (labels == 1).sum() == 3 + 3 * len(gone)
