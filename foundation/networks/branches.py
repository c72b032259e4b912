"""Layers that belong to added classes only.

A model computes the classes of its own head apart from those of branches, in calls of the same size
as before anything was added: the logits of the old classes stay the same, bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional

from foundation.config import BranchSpec, ModelConfig
from foundation.networks.backbones import Backbone
from foundation.networks.head import TextDrivenHead, as_volume

_MOST_WIDENED = 4  # times the side decoder's width
_SIDE_GROUPS = 4  # of its normalisation: the coarsest level may be a single voxel


class SideDecoder(nn.Module):
    """A small decoder over the encoder's features; its output is added to the full feature.

    Its last layer starts at zero, so that nothing is added before it has been trained.

    Args:
        backbone: Tells the channels and strides of the pyramid.
        width: Channels at the finest of the coarse levels; each coarser one has twice as many, up
            to four times.
    """

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        strides = backbone.strides
        # Coarse levels carry position: left or right, and which vertebra.
        self.levels = [i for i, stride in enumerate(strides) if stride > 1] or [len(strides) - 1]
        widths = [width * min(2**place, _MOST_WIDENED) for place in range(len(self.levels))]
        self.project = nn.ModuleList(
            nn.Conv3d(backbone.channels[level], own, 1)
            for level, own in zip(self.levels, widths, strict=True)
        )
        self.narrow = nn.ModuleList(nn.Conv3d(b, a, 1) for a, b in itertools.pairwise(widths))
        self.merge = nn.ModuleList(
            # Twice where that costs nothing.
            nn.Sequential(*(_side_block(own) for _ in range(1 if place == 0 else 2)))
            for place, own in enumerate(widths)
        )
        stride = strides[self.levels[0]]
        self.full = nn.ConvTranspose3d(width, backbone.full_channels, stride, stride=stride)
        for tensor in self.full.parameters():
            nn.init.zeros_(tensor)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Compute (B, full_channels, X, Y, Z) from the levels of the pyramid (B, C, x, y, z)."""
        feature: Tensor | None = None
        for place in reversed(range(len(self.levels))):
            here = self.project[place](pyramid[self.levels[place]])
            if feature is not None:
                coarse = self.narrow[place](feature)
                here = here + functional.interpolate(coarse, size=here.shape[2:], mode="nearest")
            feature = self.merge[place](here)
        added: Tensor = self.full(feature)
        return added


def _side_block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(width, width, 3, padding=1, bias=False),
        nn.GroupNorm(math.gcd(_SIDE_GROUPS, width), width),
        nn.LeakyReLU(0.01, inplace=True),
    )


class Branch(nn.Module):
    """The layers of one group of added classes.

    Every call takes the head of the model: classes that have only a prompt are computed by it.

    Args:
        spec: The classes and the kind of the branch.
        backbone: Tells channels and strides.
        config: Tells the length of a prompt embedding.
    """

    def __init__(self, spec: BranchSpec, backbone: Backbone, config: ModelConfig) -> None:
        super().__init__()
        self.spec = spec
        self.head: TextDrivenHead | None = None
        self.side: SideDecoder | None = None
        self.plain: nn.Conv3d | None = None
        if spec.kind != "prompt":
            self.head = TextDrivenHead(
                backbone.channels[-1],
                backbone.full_channels,
                config.text.dim,
                config.standardise_text,
            )
            # Prompts of neighbours, L1 and L2, left and right, are all but the same vector, and
            # the head needs long to tell them apart; a plain classifier beside it does so at once.
            self.plain = nn.Conv3d(backbone.full_channels, len(spec.classes), 1)
            for tensor in self.plain.parameters():
                nn.init.zeros_(tensor)
        if spec.kind == "side":
            self.side = SideDecoder(backbone, spec.width)

    def forward(
        self,
        head: TextDrivenHead,
        full: Tensor,
        pyramid: Sequence[Tensor],
        embedding: Tensor,
        rows: Sequence[int] | None = None,
        voxels: Tensor | None = None,
    ) -> Tensor:
        """Compute logits.

        Args:
            head: The head of the model.
            full: Full-resolution feature (B, C, X, Y, Z).
            pyramid: Levels (B, C, x, y, z), finest first.
            embedding: Prompt embeddings (k, D).
            rows: Which classes of the branch these are, as indices; None, all.
            voxels: Flat indices (B, M): compute these voxels only; None, all.

        Returns:
            (B, k, X, Y, Z), or (B, k, M) at `voxels`.
        """
        reader = self.head or head
        if self.side is not None:
            full = full + self.side(pyramid)
        if voxels is None:
            normalised = reader.normalise(full)
            logits = reader.read(normalised, reader.generate(pyramid[-1], embedding))
        else:
            normalised = as_volume(reader.sample(full, voxels))
            logits = reader.read(normalised, reader.generate(pyramid[-1], embedding), None)
        if self.plain is not None:
            plain = self.plain(normalised)
            logits = logits + (plain if rows is None else plain[:, list(rows)])
        return logits if voxels is None else logits.flatten(2)


def trained_rows(config: ModelConfig) -> int:
    """Return the number of classes that were not added: the head was trained with them."""
    added = sum(len(spec.classes) for spec in config.branches if not spec.replaces)
    return len(config.classes) - added


def rows_by_branch(config: ModelConfig) -> Iterator[tuple[int, Sequence[int]]]:
    """Iterate over the index of each branch and its channels; the last one of a channel counts."""
    start = trained_rows(config)
    for index, spec in enumerate(config.branches):
        if spec.replaces:
            yield index, [config.class_names.index(name) for name in spec.classes]
        else:
            yield index, range(start, start + len(spec.classes))
            start += len(spec.classes)
