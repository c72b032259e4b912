"""A network that thresholds HU: what a perfect network would see, in milliseconds."""

import torch
from torch import Tensor, nn

from foundation.config import ClassSpec, NetworkConfig, Preprocessing

WINDOW = (-1000.0, 1000.0)
ABOVE_HU = {"liver": 150.0, "liver_tumor": 450.0, "spleen": 900.0, "my_structure": -100.0}


class ThresholdNetwork(nn.Module):
    """Class k is where the first channel exceeds its level: what a perfect network would see."""

    def __init__(self, patch=(32, 32, 32), spacing_mm=(2.0, 2.0, 2.0), windows=(WINDOW,), **more):
        super().__init__()
        self.config = NetworkConfig(
            name="threshold",
            divisor=8,
            classes=tuple(
                ClassSpec(name, parent="liver" if name == "liver_tumor" else None)
                for name in ABOVE_HU
            ),
            preprocessing=Preprocessing(
                spacing_mm=spacing_mm, patch_size=patch, hu_windows=windows, overlap=0.5, **more
            ),
        )
        low, high = windows[0]
        levels = [(hu - low) / (high - low) for hu in ABOVE_HU.values()]
        self.register_buffer("levels", torch.tensor(levels))
        self.encoded: list[tuple[int, ...]] = []

    def forward(self, image: Tensor, channels=None) -> Tensor:
        """Logit 40 × (value − level): steep, but it still interpolates."""
        assert not self.training and image.min() >= 0 and image.max() <= 1
        self.encoded.append(tuple(image.shape))
        levels = self.levels if channels is None else self.levels[list(channels)]
        return 40 * (image[:, :1] - levels[None, :, None, None, None])
