"""MedNeXt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from foundation.errors import UsageError
from foundation.networks.backbones.base import Backbone, drop_outputs, register_backbone

# Variant → expansion and number of blocks of each level, finest first; the way up mirrors it.
# Reference: MedNeXt (arXiv 2303.09975), table 1.
_VARIANTS = {
    "S": ((2, 2, 2, 2, 2), (2, 2, 2, 2, 2)),
    "B": ((2, 3, 4, 4, 4), (2, 2, 2, 2, 2)),
    "M": ((2, 3, 4, 4, 4), (3, 4, 4, 4, 4)),
    "L": ((3, 4, 8, 8, 8), (3, 4, 8, 8, 8)),
}


@register_backbone("mednext")
class MedNeXtBackbone(Backbone):
    """MONAI's MedNeXt.

    Args:
        in_channels: Channels of the image.
        variant: `S`, `B`, `M` or `L` of the MedNeXt paper.
        kernel_size: 3 or 5 in that paper.
        width: Channels of the finest level, 32 in that paper; each coarser one has twice as many.

    Raises:
        UsageError: No variant has that name.
    """

    encoder_parts = ("net.stem", "net.enc_stages", "net.down_blocks", "net.bottleneck")
    strides = (1, 2, 4, 8, 16)
    divisor = 16

    def __init__(
        self, in_channels: int = 1, variant: str = "S", kernel_size: int = 3, width: int = 32
    ) -> None:
        from monai.networks.nets.mednext import MedNeXt

        super().__init__()
        if variant not in _VARIANTS:
            allowed = ", ".join(_VARIANTS)
            raise UsageError(f"Unknown MedNeXt variant {variant!r}. Choose from: {allowed}.")
        expansion, blocks = _VARIANTS[variant]
        self.net = MedNeXt(
            init_filters=width,
            in_channels=in_channels,
            kernel_size=kernel_size,
            encoder_expansion_ratio=expansion[:4],
            bottleneck_expansion_ratio=expansion[4],
            decoder_expansion_ratio=expansion[3::-1],
            blocks_down=blocks[:4],
            blocks_bottleneck=blocks[4],
            blocks_up=blocks[3::-1],
            use_residual_connection=True,
        )
        self.channels = tuple(width * stride for stride in self.strides)
        self.full_channels = width
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
