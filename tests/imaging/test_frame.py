"""Frames of the network's input."""

import torch

from foundation.imaging.frame import window_hu


def test_windows_map_hu_to_0_and_1() -> None:
    hu = torch.tensor([-1000.0, -175.0, 37.5, 250.0, 3000.0])
    assert window_hu(hu, [(-175.0, 250.0)])[0].tolist() == [0, 0, 0.5, 1, 1]
