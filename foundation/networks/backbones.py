"""Backbones behind one small contract. To add one: write its class and its row in `BACKBONES`.

MONAI is imported by the backbones that need it, when they are built: it takes several seconds, and
the embedded model does without.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foundation.errors import UsageError


class Backbone(nn.Module, ABC):
    """An image network in two halves, so that the encoder transfers without the decoder.

    channels, strides: of the feature pyramid that `encode` returns, finest first.
    full_channels: of the full-resolution feature that `decode` returns.
    divisor: every spatial size of the input must be a multiple of it.

    The pyramid's last level is the bottleneck feature, which the text-driven head pools.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    full_channels: int
    divisor: int

    @abstractmethod
    def encode(self, image: Tensor) -> list[Tensor]:
        """image (B, C, X, Y, Z), windowed to [0, 1] → levels (B, channels[i], X/strides[i], …)."""

    @abstractmethod
    def decode(self, pyramid: Sequence[Tensor]) -> Tensor:
        """pyramid → full-resolution feature (B, full_channels, X, Y, Z)."""


class _ConvBlock(nn.Sequential):
    """3×3×3 convolution, instance normalisation, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.InstanceNorm3d(outputs, affine=True),
            nn.LeakyReLU(0.01, inplace=True),
        )


class LiteUNet(Backbone):
    """The small network of the embedded weights: a plain U-Net computed at half resolution.

    A stride-2 stem gives capacity and receptive field for little time. The last up-sampling adds
    one thin full-resolution convolution of the input, so that borders follow the image and not
    the coarse grid. Instance normalisation, nnU-Net's plain design otherwise.
    """

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


class UNet(Backbone):
    """The published plain U-Net: the architecture of Models Genesis, 19.07 M parameters.

    Three poolings, two convolutions a level. The published normalisation always used the batch's
    own statistics, which for one patch is instance normalisation; so it is that here, and a patch's
    result does not depend on its neighbours in the batch.
    """

    channels = (64, 128, 256, 512)
    strides = (1, 2, 4, 8)
    full_channels = 64
    divisor = 8

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
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


def _drop_outputs(net: nn.Module, *names: str) -> None:
    """Take a network's output layers away: the text-driven head takes their place."""
    for name in names:
        setattr(net, name, nn.Identity())


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
        """feature (B, X, Y, Z, C) with even sizes → (B, X/2, Y/2, Z/2, 2·C)."""
        if any(size % 2 for size in feature.shape[1:4]):
            raise UsageError(f"Patch merging needs even sizes, not {tuple(feature.shape[1:4])}.")
        starts = [tuple(map(int, octant)) for octant in self.OCTANTS]
        merged = torch.cat([feature[:, x::2, y::2, z::2] for x, y, z in starts], -1)
        reduced: Tensor = self.reduction(self.norm(merged))
        return reduced


class SwinUNETRBackbone(Backbone):
    """MONAI's Swin UNETR with feature size 48, as published: 62.19 M parameters.

    legacy_merging: read the voxels in the order of the published weights (`LegacyPatchMerging`);
    False takes MONAI's corrected patch merging, for training from scratch.

    At least one side must have 64 voxels: instance normalisation of a single voxel is undefined.
    """

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
        _drop_outputs(self.net, "out")
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


class SegResNetBackbone(Backbone):
    """MONAI's SegResNet as SuPreM trained it: 16 initial filters, 4.70 M parameters."""

    strides = (1, 2, 4, 8)
    divisor = 8

    def __init__(self, in_channels: int = 1, init_filters: int = 16) -> None:
        from monai.networks.nets.segresnet import SegResNet

        super().__init__()
        self.net = SegResNet(
            in_channels=in_channels, init_filters=init_filters, use_conv_final=False
        )
        _drop_outputs(self.net, "conv_final")
        self.channels = tuple(init_filters * stride for stride in self.strides)
        self.full_channels = init_filters

    def encode(self, image: Tensor) -> list[Tensor]:
        _, pyramid = self.net.encode(image)
        return list(pyramid)

    def decode(self, pyramid: Sequence[Tensor]) -> Tensor:
        feature: Tensor = self.net.decode(pyramid[-1], list(reversed(pyramid)))
        return feature


class UNetPlusPlus(Backbone):
    """MONAI's UNet++ as published: 6.98 M parameters."""

    channels = (32, 32, 64, 128, 256)
    strides = (1, 2, 4, 8, 16)
    full_channels = 32
    divisor = 16

    def __init__(self, in_channels: int = 1) -> None:
        from monai.networks.nets.basic_unetplusplus import BasicUNetPlusPlus

        super().__init__()
        self.net = BasicUNetPlusPlus(
            3, in_channels, 1, features=(*self.channels, self.full_channels)
        )
        _drop_outputs(self.net, *(f"final_conv_0_{column}" for column in range(1, 5)))

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


# DiNTS with four resolutions has ten paths a block; each goes from one resolution to another.
_DINTS_FROM = (0, 1, 0, 1, 2, 1, 2, 3, 2, 3)
_DINTS_TO = (0, 0, 1, 1, 1, 2, 2, 2, 3, 3)
_DINTS_BLOCKS, _DINTS_LEVELS = 12, 4


def default_dints_paths() -> list[list[int]]:
    """Our own 12×10 architecture code: a U of six descending and six ascending blocks.

    Each entry is one path of one block: −1 closed, else the operation on it (0 pass on, 1 conv
    3×3×3, 2 conv 3×3×1, 3 conv 3×1×3, 4 conv 1×3×3). Paths that keep their resolution convolve in
    every other block; paths between resolutions only pass on, as the change itself convolves.
    """
    code = []
    for block in range(_DINTS_BLOCKS):
        descending = block < _DINTS_BLOCKS // 2
        row = []
        for source, target in zip(_DINTS_FROM, _DINTS_TO, strict=True):
            if source == target:
                row.append(1 if block % 2 == 0 else 0)
            else:
                row.append(0 if (target > source) == descending else -1)
        code.append(row)
    return code


class DiNTSBackbone(Backbone):
    """MONAI's DiNTS, 12 blocks at four resolutions from 1/2 to 1/16.

    paths: 12 rows of 10 codes, see `default_dints_paths`. The searched architecture of the
    published system is not ours to ship; its code can be given here. The features are the outputs
    of the search space, so the pyramid starts at stride 2.
    """

    channels = (64, 128, 256, 512)
    strides = (2, 4, 8, 16)
    full_channels = 32
    divisor = 16

    def __init__(self, in_channels: int = 1, paths: Sequence[Sequence[int]] | None = None) -> None:
        from monai.networks.nets.dints import DiNTS, TopologyInstance

        super().__init__()
        code = np.asarray(default_dints_paths() if paths is None else paths)
        if code.shape != (_DINTS_BLOCKS, len(_DINTS_TO)) or not np.isin(code, range(-1, 5)).all():
            raise UsageError("DiNTS paths must be 12 rows of 10 codes from -1 (closed) to 4.")
        active = code >= 0
        nodes = np.zeros((_DINTS_BLOCKS + 1, _DINTS_LEVELS), dtype=int)
        nodes[0, [_DINTS_FROM[path] for path in np.flatnonzero(active[0])]] = 1
        for block in range(_DINTS_BLOCKS):
            nodes[block + 1, [_DINTS_TO[path] for path in np.flatnonzero(active[block])]] = 1
        if not nodes[-1].all():
            raise UsageError("DiNTS paths must reach all four resolutions in the last block.")
        with contextlib.redirect_stdout(io.StringIO()):  # MONAI prints a recommendation
            space = TopologyInstance(
                arch_code=[active.astype(int), code.clip(0)],
                num_blocks=_DINTS_BLOCKS,
                num_depths=_DINTS_LEVELS,
                use_downsample=True,
            )
        self.net = DiNTS(space, in_channels, 1, use_downsample=True, node_a=nodes)
        _drop_outputs(self.net, "stem_finals")

    def encode(self, image: Tensor) -> list[Tensor]:
        net = self.net
        stems = [net.stem_down[str(level)].forward(image) for level in range(_DINTS_LEVELS)]
        inputs = [
            stem if used else torch.zeros_like(stem)
            for stem, used in zip(stems, net.node_a[0], strict=True)
        ]
        return list(net.dints_space(inputs))

    def decode(self, pyramid: Sequence[Tensor]) -> Tensor:
        feature: Tensor = self.net.stem_up[str(_DINTS_LEVELS - 1)].forward(pyramid[-1])
        for level in reversed(range(_DINTS_LEVELS - 1)):
            feature = self.net.stem_up[str(level)].forward(pyramid[level] + feature)
        return feature


class MedNeXtBackbone(Backbone):
    """MONAI's MedNeXt.

    variant: `S`, `B`, `M` or `L` of the MedNeXt paper; kernel_size: 3 or 5 there.
    """

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
        _drop_outputs(self.net, "out_0")

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


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "lite_unet": LiteUNet,
    "unet": UNet,
    "swin_unetr": SwinUNETRBackbone,
    "segresnet": SegResNetBackbone,
    "unetpp": UNetPlusPlus,
    "dints": DiNTSBackbone,
    "mednext": MedNeXtBackbone,
}


def build_backbone(name: str, in_channels: int, **options: Any) -> Backbone:
    """Build a backbone by name.

    Raises:
        UsageError: no backbone has that name, or it does not take one of the options.
    """
    if name not in BACKBONES:
        raise UsageError(f"Unknown backbone {name!r}. Choose from: {', '.join(BACKBONES)}.")
    try:
        return BACKBONES[name](in_channels=in_channels, **options)
    except TypeError as error:
        raise UsageError(f"Backbone {name!r} cannot be built with {options}: {error}.") from error
