"""A model with a head without text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from foundation.config import NetworkConfig
from foundation.networks.plain_head import PlainHead

if TYPE_CHECKING:
    pass

from foundation.model.base import Model


class PlainModel(Model):
    """A backbone with a head without text: one channel a class, as in the published transfer.

    Args:
        config: Architecture, classes, activation and preprocessing.

    Raises:
        UsageError: The backbone cannot be built.
    """

    head: PlainHead

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        count = len(config.classes)
        self.head = PlainHead(self.backbone.full_channels, count, config.activation)

    def forward(self, image: Tensor, channels: Sequence[int] | None = None) -> Tensor:
        """Compute the logits of the classes.

        Args:
            image: (B, C, X, Y, Z), preprocessed.
            channels: Which classes, as indices; a softmax always gives all.

        Returns:
            (B, k, X, Y, Z) for a sigmoid; (B, 1 + K, X, Y, Z) for a softmax, background first.

        Raises:
            UsageError: The image does not fit, see `features`.
        """
        logits: Tensor = self.head(self.backbone.decode(self.features(image)), channels)
        return logits

    def logits_at(self, image: Tensor, voxels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits at some voxels only, for a loss on a sample of them.

        Args:
            image: (B, C, X, Y, Z), preprocessed.
            voxels: Flat indices (B, M); with one for each voxel, they must be in order.

        Returns:
            Logits (B, K, M), or (B, 1 + K, M) for a softmax, and the features (B, C, M) there.

        Raises:
            UsageError: The image does not fit, see `features`.
        """
        sampled = self.backbone.decode(self.features(image)).flatten(2)
        if voxels.shape[1] != sampled.shape[2]:
            sampled = sampled.gather(2, voxels[:, None].expand(-1, sampled.shape[1], -1))
        return self.head.logits_at(sampled), sampled
