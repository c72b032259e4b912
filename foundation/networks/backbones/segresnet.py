"""SegResNet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from foundation.networks.backbones.base import Backbone, drop_outputs, register_backbone

_GROUPS = 8  # of the normalisations, MONAI's default; fewer where a width is no multiple of it


@register_backbone("segresnet")
class SegResNetBackbone(Backbone):
    """MONAI's SegResNet as SuPreM trained it: 16 initial filters, 4.70 M parameters.

    Args:
        in_channels: Channels of the image.
        init_filters: Channels of the finest level; each coarser one has twice as many.
    """

    encoder_parts = ("net.convInit", "net.down_layers")
    strides = (1, 2, 4, 8)
    divisor = 8

    def __init__(self, in_channels: int = 1, init_filters: int = 16) -> None:
        from monai.networks.nets.segresnet import SegResNet

        super().__init__()
        groups = math.gcd(_GROUPS, init_filters)
        self.net = SegResNet(
            in_channels=in_channels,
            init_filters=init_filters,
            norm=("GROUP", {"num_groups": groups}),
            use_conv_final=False,
        )
        drop_outputs(self.net, "conv_final")
        self.channels = tuple(init_filters * stride for stride in self.strides)
        self.full_channels = init_filters

    def encode(self, image: Tensor) -> list[Tensor]:
        _, pyramid = self.net.encode(image)
        return list(pyramid)

    def decode(self, pyramid: Sequence[Tensor]) -> Tensor:
        feature: Tensor = self.net.decode(pyramid[-1], list(reversed(pyramid)))
        return feature
