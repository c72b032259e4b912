"""What classes that were added to trained weights have of their own, and how all are read out.

The rows of the trained head are computed apart from the others, in calls of the same size as
before anything was added: the old classes' logits stay the same, bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from foundation.config import BranchSpec, ModelConfig
from foundation.networks.backbones import Backbone
from foundation.networks.head import TextDrivenHead

_MOST_WIDENED = 4  # times the side decoder's width
_SIDE_GROUPS = 4  # of its normalisation: the coarsest level may be a single voxel


class Readable(Protocol):
    """What reading out needs of a model."""

    config: ModelConfig
    head: TextDrivenHead
    prompt_embedding: Tensor
    branches: nn.ModuleList


class SideDecoder(nn.Module):
    """A small decoder over the encoder's features: what is added to the backbone's full feature.

    width: channels at the finest of the coarse levels; each coarser one has twice as many, up to
    four times. Its last layer starts at zero, so that nothing is added before it has learnt
    something.
    """

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        strides = backbone.strides
        # The coarsest say which side of the body this is, and which of many alike vertebrae.
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
        """Features of all levels (B, C, x, y, z) each → (B, full_channels, X, Y, Z)."""
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
    """One group of added classes; see `BranchSpec` for its kinds.

    Every call takes the head of the model, which classes with nothing but a prompt are read by.
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
    ) -> Tensor:
        """full (B, C, X, Y, Z), pyramid, embedding (k, D) → logits (B, k, X, Y, Z).

        rows: which of the branch's classes the embeddings are of; all if not given.
        """
        reader = self.head or head
        normalised = reader.normalise(self._full(full, pyramid))
        logits: Tensor = reader.read(normalised, reader.generate(pyramid[-1], embedding))
        if self.plain is None:
            return logits
        plain: Tensor = self.plain(normalised)
        return logits + (plain if rows is None else plain[:, list(rows)])

    def logits_at(
        self,
        head: TextDrivenHead,
        full: Tensor,
        pyramid: Sequence[Tensor],
        embedding: Tensor,
        voxels: Tensor,
    ) -> Tensor:
        """As `forward`, at flat voxel indices (B, M) only: logits (B, k, M)."""
        reader = self.head or head
        sampled = reader.sample(self._full(full, pyramid), voxels)
        logits = reader.logits_at(sampled, reader.generate(pyramid[-1], embedding))
        if self.plain is None:
            return logits
        plain: Tensor = self.plain(sampled[..., None, None]).flatten(2)
        return logits + plain

    def _full(self, full: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
        return full if self.side is None else full + self.side(pyramid)


def trained_rows(config: ModelConfig) -> int:
    """How many of the classes the weights' own head was trained with: those in no branch."""
    return len(config.classes) - sum(len(spec.classes) for spec in config.branches)


def rows_by_branch(config: ModelConfig) -> Iterator[tuple[int, range]]:
    """Index of each branch, and its channels."""
    start = trained_rows(config)
    for index, spec in enumerate(config.branches):
        yield index, range(start, start + len(spec.classes))
        start += len(spec.classes)


def read_out(
    network: Readable,
    full: Tensor,
    pyramid: Sequence[Tensor],
    channels: Sequence[int] | None = None,
) -> Tensor:
    """Logits (B, K, X, Y, Z) of a model's classes from its features.

    channels: which classes, as indices; all if not given.
    """
    wanted = list(range(len(network.config.classes)) if channels is None else channels)
    embedding = network.prompt_embedding
    own = trained_rows(network.config)
    parts: list[Tensor] = []
    order: list[int] = []
    trained = [channel for channel in wanted if channel < own]
    if trained:
        # Not a copy of the rows where all are wanted: the same memory gives the same sums.
        rows = embedding[:own] if trained == list(range(own)) else embedding[trained]
        generated = network.head.generate(pyramid[-1], rows)
        parts.append(network.head(full, generated))
        order += trained
    for index, channels_of in rows_by_branch(network.config):
        mine = [channel for channel in wanted if channel in channels_of]
        if mine:
            branch = network.branches[index]
            own_rows = [channel - channels_of.start for channel in mine]
            parts.append(branch(network.head, full, pyramid, embedding[mine], own_rows))
            order += mine
    logits = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return logits if order == wanted else logits[:, [order.index(channel) for channel in wanted]]


def read_out_at(
    network: Readable, full: Tensor, pyramid: Sequence[Tensor], voxels: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (B, K, M) of all classes at flat voxel indices (B, M), and the features (B, C, M)."""
    embedding = network.prompt_embedding
    own = trained_rows(network.config)
    generated = network.head.generate(pyramid[-1], embedding[:own])
    sampled = network.head.sample(full, voxels)
    parts = [network.head.logits_at(sampled, generated)]
    for index, rows in rows_by_branch(network.config):
        branch = network.branches[index]
        assert isinstance(branch, Branch)
        mine = embedding[rows.start : rows.stop]
        parts.append(branch.logits_at(network.head, full, pyramid, mine, voxels))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1), sampled
