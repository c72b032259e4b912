"""The small network of the embedded weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foundation.networks.backbones.base import Backbone, register_backbone


class _ConvBlock(nn.Sequential):
    """3×3×3 convolution, instance normalisation, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.InstanceNorm3d(outputs, affine=True),
            nn.LeakyReLU(0.01, inplace=True),
        )


@register_backbone("lite_unet")
class LiteUNet(Backbone):
    """The small network of the embedded weights: a plain U-Net computed at half resolution.

    A stride-2 stem gives capacity and receptive field for little time. The last up-sampling adds
    one thin full-resolution convolution of the input, so that borders follow the image and not
    the coarse grid. Instance normalisation, nnU-Net's plain design otherwise.
    """

    encoder_parts = ("down", "detail")

    def __init__(
        self, in_channels: int = 1, widths: Sequence[int] = (24, 48, 96, 192, 256), full: int = 16
    ) -> None:
        super().__init__()
        self.channels = (full, *widths)
        self.strides = tuple(2**level for level in range(len(self.channels)))
        self.full_channels = full
        self.divisor = self.strides[-1]
        inputs = (in_channels, *widths[:-1])
        self.down = nn.ModuleList(
            nn.Sequential(_ConvBlock(i, o, stride=2), _ConvBlock(o, o))
            for i, o in zip(inputs, widths, strict=True)
        )
        pairs = list(itertools.pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose3d(deep, fine, 2, stride=2) for fine, deep in pairs)
        self.merge = nn.ModuleList(
            nn.Sequential(_ConvBlock(2 * fine, fine), _ConvBlock(fine, fine)) for fine, _ in pairs
        )
        self.detail = nn.Conv3d(in_channels, full, 3, padding=1)
        # The image would drown what the decoder says at first: it joins as training asks for it.
        nn.init.zeros_(self.detail.weight)
        self.full_up = nn.ConvTranspose3d(widths[0], full, 2, stride=2)

    def encode(self, image: Tensor) -> list[Tensor]:
        pyramid = []
        feature = image
        for stage in self.down:
            feature = stage(feature)
            pyramid.append(feature)
        # The thin full-resolution path rides along so that `decode` needs only the pyramid.
        return [self.detail(image), *pyramid]

    def decode(self, pyramid: Sequence[Tensor]) -> Tensor:
        detail, *levels = pyramid
        feature = levels[-1]
        for level in reversed(range(len(levels) - 1)):
            upsampled = self.up[level](feature)
            feature = self.merge[level](torch.cat([levels[level], upsampled], 1))
        full: Tensor = self.full_up(feature) + detail
        return full
