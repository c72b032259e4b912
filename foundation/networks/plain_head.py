"""A head without text: one 1×1×1 convolution, by which the published transfer is measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from foundation.config import Activation


class PlainHead(nn.Module):
    """One channel a class, of a convolution of 1×1×1 voxels; of a softmax, background first.

    Args:
        full_channels: Channels of the full-resolution feature.
        classes: Number of classes, without background.
        activation: What follows the logits: "softmax" or "sigmoid".
    """

    def __init__(self, full_channels: int, classes: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        background = 1 if activation == "softmax" else 0
        self.convolution = nn.Conv3d(full_channels, background + classes, 1)

    def forward(self, full: Tensor, channels: Sequence[int] | None = None) -> Tensor:
        """Compute logits (B, k, X, Y, Z), or (B, 1 + K, X, Y, Z) for a softmax.

        Args:
            full: Full-resolution feature (B, C, X, Y, Z).
            channels: The wanted classes; a softmax needs all, and gives all.
        """
        logits: Tensor = self.convolution(full)
        return logits if channels is None or self.activation == "softmax" else logits[:, channels]

    def logits_at(self, sampled: Tensor) -> Tensor:
        """Return logits (B, K, M), or (B, 1 + K, M), of features (B, C, M) at some voxels."""
        weight, bias = self.convolution.weight, self.convolution.bias
        return functional.conv1d(sampled, weight.flatten(2), bias)
