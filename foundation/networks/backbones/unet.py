"""The plain U-Net of Models Genesis."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foundation.networks.backbones.base import Backbone, register_backbone


@register_backbone("unet")
class UNet(Backbone):
    """The published plain U-Net: the architecture of Models Genesis, 19.07 M parameters.

    Three poolings, two convolutions a level. The published normalisation always used the batch's
    own statistics, which for one patch is instance normalisation; so it is that here, and a patch's
    result does not depend on its neighbours in the batch.

    Args:
        in_channels: Channels of the image.
        width: Channels of the finest level; each coarser one has twice as many.
    """

    encoder_parts = ("down",)
    strides = (1, 2, 4, 8)
    divisor = 8

    def __init__(self, in_channels: int = 1, width: int = 64) -> None:
        super().__init__()
        self.channels = tuple(width * stride for stride in self.strides)
        self.full_channels = width
        inputs = (in_channels, *self.channels[:-1])
        # The published order doubles the width in the second convolution of a level.
        self.down = nn.ModuleList(
            nn.Sequential(_plain_conv(i, o // 2), _plain_conv(o // 2, o))
            for i, o in zip(inputs, self.channels, strict=True)
        )
        pairs = list(itertools.pairwise(self.channels))
        self.up = nn.ModuleList(nn.ConvTranspose3d(deep, deep, 2, stride=2) for _, deep in pairs)
        self.merge = nn.ModuleList(
            nn.Sequential(_plain_conv(deep + fine, fine), _plain_conv(fine, fine))
            for fine, deep in pairs
        )

    def encode(self, image: Tensor) -> list[Tensor]:
        pyramid = [self.down[0](image)]
        for stage in list(self.down)[1:]:
            pyramid.append(stage(nn.functional.max_pool3d(pyramid[-1], 2)))
        return pyramid

    def decode(self, pyramid: Sequence[Tensor]) -> Tensor:
        feature = pyramid[-1]
        for level in reversed(range(len(pyramid) - 1)):
            upsampled = self.up[level](feature)
            feature = self.merge[level](torch.cat([upsampled, pyramid[level]], 1))
        return feature


def _plain_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, padding=1),
        nn.InstanceNorm3d(outputs, affine=True),
        nn.ReLU(inplace=True),
    )
