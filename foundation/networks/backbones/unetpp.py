"""UNet++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foundation.networks.backbones.base import Backbone, drop_outputs, register_backbone


@register_backbone("unetpp")
class UNetPlusPlus(Backbone):
    """MONAI's UNet++ as published: 6.98 M parameters.

    Args:
        in_channels: Channels of the image.
        width: Channels of the two finest levels; each coarser one has twice as many.
    """

    encoder_parts = ("net.conv_0_0", "net.conv_1_0", "net.conv_2_0", "net.conv_3_0", "net.conv_4_0")
    strides = (1, 2, 4, 8, 16)
    divisor = 16

    def __init__(self, in_channels: int = 1, width: int = 32) -> None:
        from monai.networks.nets.basic_unetplusplus import BasicUNetPlusPlus

        super().__init__()
        self.channels = tuple(width * times for times in (1, 1, 2, 4, 8))
        self.full_channels = width
        self.net = BasicUNetPlusPlus(
            3, in_channels, 1, features=(*self.channels, self.full_channels)
        )
        drop_outputs(self.net, *(f"final_conv_0_{column}" for column in range(1, 5)))

    def encode(self, image: Tensor) -> list[Tensor]:
        pyramid = []
        feature = image
        for level in range(len(self.channels)):
            feature = getattr(self.net, f"conv_{level}_0")(feature)
            pyramid.append(feature)
        return pyramid

    def decode(self, pyramid: Sequence[Tensor]) -> Tensor:
        grid = [[feature] for feature in pyramid]  # grid[level][column], as in the UNet++ paper
        for column in range(1, len(pyramid)):
            for level in range(len(pyramid) - column):
                merge = getattr(self.net, f"upcat_{level}_{column}")
                grid[level].append(merge(grid[level + 1][column - 1], torch.cat(grid[level], 1)))
        return grid[0][-1]
