"""The pretrained encoder under a decoder of your own, here MONAI's U-Net blocks.

    python finetune/encoder.py --steps 200

For people who have a network, a loss and a loader, and want the pretrained features under them.
`Network` is all there is to it: the encoder gives a pyramid of features, finest first, and says how
many channels and which stride each level has. Put your own scans in the place of `batch`, which
cuts generated ones: RAS, at the spacing of the weights, windowed as they were trained.

The encoder learns at a tenth of the decoder's rate; with `--encoder-share 0` it does not.
Hardware: two CPU cores do a step a second. Measured: see benchmarks/README.md.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from monai.losses import DiceCELoss
from monai.networks.nets.basic_unet import UpCat
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange

from foundation import Encoder, from_pretrained
from foundation.imaging.frame import window_hu
from foundation.synthesis import SMOKE_LABELS, generated_scan
from foundation.tuning.recipe import settings_of

HU_WINDOWS = ((-175.0, 250.0), (-1000.0, 1000.0))  # of universal-ct: `universal-ct info` says


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
        """image (B, C, X, Y, Z), windowed → logits (B, classes, X, Y, Z), the background first."""
        *levels, feature = self.encoder(image)
        for up, level in zip(reversed(self.up), reversed(levels), strict=True):
            feature = up(feature, level)
        return functional.interpolate(self.read(feature), image.shape[2:], mode="trilinear")


def main(given: Sequence[str] | None = None) -> None:
    """Read the command line, train."""
    with settings_of(Settings, __doc__, given, smoke={"steps": 2}) as settings:
        encoder = from_pretrained(settings.model, features_only=True)
        torch.manual_seed(settings.seed)
        network = Network(encoder, classes=1 + len(SMOKE_LABELS)).train()
        decoder = [*network.up.parameters(), *network.read.parameters()]
        rate = settings.learning_rate
        optimizer = torch.optim.AdamW(
            [
                {"params": decoder, "lr": rate},
                {"params": encoder.parameters(), "lr": rate * settings.encoder_share},
            ]
        )
        objective = DiceCELoss(to_onehot_y=True, softmax=True)
        for step in (bar := trange(settings.steps, desc="encoder", unit="step")):
            image, target = batch(settings.seed + step)
            loss = objective(network(image), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}")
        print(f"{sum(map(torch.numel, decoder))} parameters above the encoder", file=sys.stderr)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """A generated scan (1, C, 64, 32, 32) in [0, 1], and its labels (1, 1, 64, 32, 32)."""
    hu, labels = (torch.from_numpy(each)[:, 8:40, 8:40] for each in generated_scan(seed))
    return window_hu(hu.float(), HU_WINDOWS)[None], labels[None, None]


if __name__ == "__main__":
    main()
