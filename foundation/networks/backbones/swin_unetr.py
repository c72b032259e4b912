"""Swin UNETR, with the patch merging of the published weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foundation.errors import UsageError
from foundation.networks.backbones.base import Backbone, drop_outputs, register_backbone


class LegacyPatchMerging(nn.Module):
    """The patch merging the published Swin weights were trained with; for MONAI's `downsample`.

    It is the one MONAI had before 1.5: of the eight voxels of a 2×2×2 cell two are read twice and
    two never. The corrected order loads the same weights without complaint and is wrong for them.
    """

    OCTANTS = ("000", "100", "010", "001", "101", "010", "001", "111")

    def __init__(
        self, dim: int, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm, spatial_dims: int = 3
    ) -> None:
        super().__init__()
        if spatial_dims != 3:
            raise UsageError(f"Legacy patch merging is for 3 spatial axes, not {spatial_dims}.")
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(8 * dim)

    def forward(self, feature: Tensor) -> Tensor:
        """Merge cells of 2×2×2 voxels.

        Args:
            feature: (B, X, Y, Z, C), with even sizes.

        Returns:
            (B, X / 2, Y / 2, Z / 2, 2 · C).

        Raises:
            UsageError: A size is odd.
        """
        if any(size % 2 for size in feature.shape[1:4]):
            raise UsageError(f"Patch merging needs even sizes, not {tuple(feature.shape[1:4])}.")
        starts = [tuple(map(int, octant)) for octant in self.OCTANTS]
        merged = torch.cat([feature[:, x::2, y::2, z::2] for x, y, z in starts], -1)
        reduced: Tensor = self.reduction(self.norm(merged))
        return reduced


@register_backbone("swin_unetr")
class SwinUNETRBackbone(Backbone):
    """MONAI's Swin UNETR with feature size 48, as published: 62.19 M parameters.

    At least one side must have 64 voxels: instance normalisation of a single voxel is undefined.

    Args:
        in_channels: Channels of the image.
        feature_size: Channels of the finest level.
        legacy_merging: Read the voxels in the order of the published weights
            (`LegacyPatchMerging`); False takes MONAI's corrected patch merging, for training from
            scratch.
    """

    encoder_parts = (
        "net.swinViT",
        "net.encoder1",
        "net.encoder2",
        "net.encoder3",
        "net.encoder4",
        "net.encoder10",
    )
    strides = (1, 2, 4, 8, 16, 32)
    divisor = 32

    def __init__(
        self, in_channels: int = 1, feature_size: int = 48, legacy_merging: bool = True
    ) -> None:
        from monai.networks.nets.swin_unetr import PatchMergingV2, SwinUNETR

        super().__init__()
        merging: Any = LegacyPatchMerging if legacy_merging else PatchMergingV2
        self.net = SwinUNETR(
            in_channels=in_channels, out_channels=1, feature_size=feature_size, downsample=merging
        )
        drop_outputs(self.net, "out")
        self.channels = tuple(feature_size * times for times in (1, 1, 2, 4, 8, 16))
        self.full_channels = feature_size

    def encode(self, image: Tensor) -> list[Tensor]:
        net = self.net
        hidden = net.swinViT(image, net.normalize)
        return [
            net.encoder1(image),
            net.encoder2(hidden[0]),
            net.encoder3(hidden[1]),
            net.encoder4(hidden[2]),
            hidden[3],
            net.encoder10(hidden[4]),
        ]

    def decode(self, pyramid: Sequence[Tensor]) -> Tensor:
        net = self.net
        decoders = (net.decoder1, net.decoder2, net.decoder3, net.decoder4, net.decoder5)
        feature = pyramid[-1]
        for level in reversed(range(len(decoders))):
            feature = decoders[level](feature, pyramid[level])
        return feature
