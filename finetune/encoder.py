"""The pretrained encoder under a decoder of your own, here MONAI's U-Net blocks.

    python finetune/encoder.py --steps 200

For people who have a network, a loss and a loader, and want the pretrained features under them. The
encoder gives a pyramid of features, finest first, and tells the channels and the stride of each
level. It also reads a CT as it was trained to see it: `encoder.preprocess(path)`. Put your own
scans in the place of `generated_scan`.

The encoder learns at a tenth of the decoder's rate; with `--encoder-share 0` it does not.
Hardware: two CPU cores do a step a second. Measured: see benchmarks/README.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets.basic_unet import UpCat
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange

from foundation import Encoder, from_pretrained
from foundation.synthesis import SMOKE_LABELS, generated_scan
from foundation.tuning import settings_of


@dataclass(frozen=True)
class Settings:
    """What can be set: each field is an option of the command line."""

    model: str = "universal-ct"
    steps: int = 200
    learning_rate: float = 1e-3
    encoder_share: float = 0.1
    seed: int = 0


class Network(nn.Module):
    """MONAI's decoder over our encoder: at each level up, join what the encoder saw there."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder, levels = encoder, list(itertools.pairwise(encoder.channels))
        act, norm = ("LeakyReLU", {"negative_slope": 0.01}), ("instance", {"affine": True})
        self.up = nn.ModuleList(UpCat(3, b, a, a, act, norm, bias=False) for a, b in levels)
        self.read = nn.Conv3d(encoder.channels[0], classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, C, X, Y, Z), preprocessed → logits (B, classes, X, Y, Z), background first."""
        *levels, feature = self.encoder(image)
        for up, level in zip(reversed(self.up), reversed(levels), strict=True):
            feature = up(feature, level)
        return functional.interpolate(self.read(feature), image.shape[2:], mode="trilinear")


def main(given: Sequence[str] | None = None) -> None:
    """Encoder, network, optimiser, steps."""
    with settings_of(Settings, __doc__, given, smoke={"steps": 2}) as settings:
        # 1. The encoder without its decoder, under a network for background and a few classes.
        encoder = from_pretrained(settings.model, features_only=True)
        torch.manual_seed(settings.seed)
        network = Network(encoder, classes=1 + len(SMOKE_LABELS)).train()

        # 2. What is new learns fast, what was pretrained slowly.
        new = [*network.up.parameters(), *network.read.parameters()]
        slow = settings.learning_rate * settings.encoder_share
        groups = [{"params": new}, {"params": encoder.parameters(), "lr": slow}]
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
        objective = DiceCELoss(to_onehot_y=True, softmax=True)

        # 3. A scan a step: HU and labels on a grid of 3 mm, of which a patch is cut.
        for step in (bar := trange(settings.steps, desc="encoder", unit="step")):
            hu, labels = generated_scan(settings.seed + step)
            image = encoder.preprocess((hu, np.diag([3.0, 3.0, 3.0, 1.0])))[None, ..., 8:40, 8:40]
            target = torch.from_numpy(labels)[None, None, :, 8:40, 8:40]
            loss = objective(network(image), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
