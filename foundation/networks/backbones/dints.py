"""DiNTS, a network whose paths were searched."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from foundation.errors import UsageError
from foundation.networks.backbones.base import Backbone, drop_outputs, register_backbone

# DiNTS with four resolutions has ten paths a block; each goes from one resolution to another.
_DINTS_FROM = (0, 1, 0, 1, 2, 1, 2, 3, 2, 3)
_DINTS_TO = (0, 0, 1, 1, 1, 2, 2, 2, 3, 3)
_DINTS_BLOCKS, _DINTS_LEVELS = 12, 4
_DINTS_WIDTH = 32  # of MONAI's, which takes another one as a multiple


def default_dints_paths() -> list[list[int]]:
    """Make our own architecture code: a U of six descending and six ascending blocks.

    Returns:
        12 rows, one a block, of 10 codes, one a path. An entry is −1 for a closed path, or the
        operation on it: 0 pass on, 1 conv 3×3×3, 2 conv 3×3×1, 3 conv 3×1×3, 4 conv 1×3×3. Paths
        that keep their resolution convolve in every other block; paths between resolutions only
        pass on, as the change itself convolves.
    """
    code = []
    for block in range(_DINTS_BLOCKS):
        descending = block < _DINTS_BLOCKS // 2
        kept = 1 if block % 2 == 0 else 0
        code.append(
            [
                kept if source == target else 0 if (target > source) == descending else -1
                for source, target in zip(_DINTS_FROM, _DINTS_TO, strict=True)
            ]
        )
    return code


@register_backbone("dints")
class DiNTSBackbone(Backbone):
    """MONAI's DiNTS, 12 blocks at four resolutions from 1/2 to 1/16.

    The features are the outputs of the search space, so the pyramid starts at stride 2.

    Args:
        in_channels: Channels of the image.
        paths: 12 rows of 10 codes, see `default_dints_paths`. The searched architecture of the
            published system is not ours to ship; its code can be given here.
        width: Channels at full resolution; each coarser level has twice as many.

    Raises:
        UsageError: `paths` has another shape, another code, or leaves out a resolution.
    """

    encoder_parts = ("net.stem_down", "net.dints_space")
    strides = (2, 4, 8, 16)
    divisor = 16

    def __init__(
        self,
        in_channels: int = 1,
        paths: Sequence[Sequence[int]] | None = None,
        width: int = 32,
    ) -> None:
        from monai.networks.nets.dints import DiNTS, TopologyInstance

        super().__init__()
        self.channels = tuple(width * stride for stride in self.strides)
        self.full_channels = width
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
                channel_mul=width / _DINTS_WIDTH,
                num_blocks=_DINTS_BLOCKS,
                num_depths=_DINTS_LEVELS,
                use_downsample=True,
            )
        self.net = DiNTS(space, in_channels, 1, use_downsample=True, node_a=nodes)
        drop_outputs(self.net, "stem_finals")

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
