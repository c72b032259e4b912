"""MedNeXt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from foundation.errors import UsageError
from foundation.networks.backbones.base import Backbone, drop_outputs, register_backbone


@register_backbone("mednext")
class MedNeXtBackbone(Backbone):
    """MONAI's MedNeXt.

    Args:
        in_channels: Channels of the image.
        variant: `S`, `B`, `M` or `L` of the MedNeXt paper.
        kernel_size: 3 or 5 in that paper.

    Raises:
        UsageError: No variant has that name.
    """

    encoder_parts = ("net.stem", "net.enc_stages", "net.down_blocks", "net.bottleneck")
    channels = (32, 64, 128, 256, 512)
    strides = (1, 2, 4, 8, 16)
    full_channels = 32
    divisor = 16

    def __init__(self, in_channels: int = 1, variant: str = "S", kernel_size: int = 3) -> None:
        from monai.networks.nets.mednext import create_mednext

        super().__init__()
        if variant not in ("S", "B", "M", "L"):
            raise UsageError(f"Unknown MedNeXt variant {variant!r}. Choose from: S, B, M, L.")
        self.net = create_mednext(variant, in_channels=in_channels, kernel_size=kernel_size)
        drop_outputs(self.net, "out_0")

    def encode(self, image: Tensor) -> list[Tensor]:
        net = self.net
        feature = net.stem(image)
        pyramid = []
        for stage, down in zip(net.enc_stages, net.down_blocks, strict=True):
            pyramid.append(stage(feature))
            feature = down(pyramid[-1])
        return [*pyramid, net.bottleneck(feature)]

    def decode(self, pyramid: Sequence[Tensor]) -> Tensor:
        *skips, feature = pyramid
        for up, stage in zip(self.net.up_blocks, self.net.dec_stages, strict=True):
            feature = stage(up(feature) + skips.pop())
        return feature
