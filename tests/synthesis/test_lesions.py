"""Grown lesions lie in their organ and stay its own."""

import numpy as np
import torch
from anatomies import paired_organs

from foundation.synthesis.lesions import LESION_HOSTS, grow_lesion


def test_a_lesion_takes_voxels_of_its_organ_only() -> None:
    anatomy = paired_organs()
    before = torch.from_numpy(anatomy.label_map)
    for seed in range(10):
        labels, sets, names = before.clone(), dict(anatomy.sets), dict(anatomy.names)
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        grow_lesion(labels, sets, names, anatomy.annotated, 2.0, rng, generator)
        added = dict(names.items() - anatomy.names.items())
        (lesion,) = set(added.values())
        changed = labels != before
        assert set(labels[changed].tolist()) == set(added) and changed.any()
        for now, was in zip(labels[changed].tolist(), before[changed].tolist(), strict=True):
            assert sets[was] & {*LESION_HOSTS[lesion]}
            assert sets[now] == sets[was] | {lesion}  # each voxel stays its own organ's
