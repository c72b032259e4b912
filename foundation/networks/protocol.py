"""What inference, evaluation and export ask of a network, and which further parts it may have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from foundation.config import NetworkConfig
from foundation.errors import UsageError

Part = Literal["features", "logits"]
_PARTS = {
    "features": "features(image), its feature pyramid",
    "logits": "logits(image, prompts): it is not driven by text",
}


class Network(Protocol):
    """A segmentation network. Nothing that segments, evaluates or exports asks for more.

    Any `torch.nn.Module` with a `config` and this `forward` is one.

    Attributes:
        config: Classes, preprocessing, activation and divisor.
        training: Whether it is in training mode.
    """

    training: bool

    @property
    def config(self) -> NetworkConfig:
        """Classes, preprocessing, activation and divisor."""

    def __call__(self, image: Tensor, channels: Sequence[int] | None = None) -> Tensor:
        """Compute logits.

        Args:
            image: (B, C, X, Y, Z), preprocessed as `config.preprocessing` describes; every spatial
                size is a multiple of `config.divisor`.
            channels: The classes that are wanted, as indices into `config.classes`; None, all.

        Returns:
            With `config.activation` "sigmoid", (B, k, X, Y, Z): the wanted classes in their order.
            With "softmax", (B, 1 + K, X, Y, Z): background, then all classes, whatever is wanted.
        """

    def train(self, mode: bool = ...) -> Any:
        """Switch between training and evaluation."""

    def to(self, device: torch.device) -> Any:
        """Move to a device."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the weights: the first one tells the device and the type of number."""


def check_trainable(config: NetworkConfig) -> None:
    """Refuse a configuration that inference follows and the reading of training scans does not.

    Raises:
        UsageError: Another orientation than RAS, another spacing along another axis, or HU that
            are not scaled to [0, 1].
    """
    pre = config.preprocessing
    if pre.orientation != "RAS" or len(set(pre.spacing_mm)) > 1 or pre.hu_mean_std:
        raise UsageError(
            f"Training reads scans in RAS, at one spacing, with HU windows scaled to [0, 1]; "
            f"{config.name!r} has {pre.orientation}, {pre.spacing_mm} mm, hu_mean_std "
            f"{pre.hu_mean_std or 'not given'}."
        )


def require(network: Network, part: Part, purpose: str) -> None:
    """Refuse a network that lacks an optional part.

    Args:
        network: Any network.
        part: `features`, for `features(image)` → the feature pyramid, finest level first; or
            `logits`, for `logits(image, prompts)` → (B, K, X, Y, Z) of the classes whose prompt
            embeddings (K, D) are given.
        purpose: What needs it, for the error: "Adding a class".

    Raises:
        UsageError: The network does not have the part.
    """
    if not callable(getattr(network, part, None)):
        raise UsageError(
            f"{purpose} is not possible with {network.config.name!r} "
            f"({type(network).__name__}), which has no {_PARTS[part]}."
        )
