"""What a backbone is, and the registry in which it is found by name."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from foundation.errors import UniversalCTError, UsageError
from foundation.settings import did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self


# What PyTorch, MONAI and numpy raise when a network is asked for that cannot be.
BUILDING = (
    *(TypeError, ValueError, AttributeError, LookupError, ArithmeticError),
    *(AssertionError, RuntimeError),
)


class Backbone(nn.Module, ABC):
    """An image network in two halves, so that the encoder transfers without the decoder.

    The last level of the pyramid is the bottleneck feature, which the text-driven head pools.

    Attributes:
        encoder_parts: Names of all submodules with parameters that `encode` uses ("down",
            "net.stem"); `decode` uses the others.
        channels: Channels of each level of the pyramid that `encode` returns, finest first.
        strides: Stride of each level, in voxels of the image.
        full_channels: Channels of the full-resolution feature that `decode` returns.
        divisor: Every spatial size of the image must be a multiple of it.
    """

    encoder_parts: tuple[str, ...] = ()
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    full_channels: int
    divisor: int

    @abstractmethod
    def encode(self, image: Tensor) -> list[Tensor]:
        """Compute the feature pyramid.

        Args:
            image: (B, C, X, Y, Z), preprocessed.

        Returns:
            One tensor a level, (B, channels[i], X / strides[i], Y / strides[i], Z / strides[i]).
        """

    @abstractmethod
    def decode(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Compute the full-resolution feature (B, full_channels, X, Y, Z) from the pyramid."""

    @cached_property
    def has_instance_norm(self) -> bool:
        """Whether a layer normalises over the voxels of one image: it needs more than one."""
        return any(isinstance(module, nn.InstanceNorm3d) for module in self.modules())

    def without_decoder(self) -> Self:
        """Return a backbone that has the parts of `encode` only, and shares their weights."""
        half = copy.copy(self)
        _keep_parts(half, self.encoder_parts)
        return half


def _keep_parts(module: nn.Module, parts: Sequence[str]) -> None:
    """Replace the submodules of a shallow copy by those among `parts`; the original keeps all."""
    kept: dict[str, nn.Module | None] = {}
    for name in dict.fromkeys(part.split(".")[0] for part in parts):
        kept[name] = child = module.get_submodule(name)
        inner = [part.removeprefix(f"{name}.") for part in parts if part.startswith(f"{name}.")]
        if inner:
            kept[name] = child = copy.copy(child)
            _keep_parts(child, inner)
    module._modules = kept


BACKBONES: dict[str, type[Backbone]] = {}
_Registered = TypeVar("_Registered", bound=type[Backbone])


def register_backbone(name: str) -> Callable[[_Registered], _Registered]:
    """Make a backbone known by `name`, in configurations and in `build_backbone`; a decorator.

        @register_backbone("my_net")
        class MyNet(Backbone): ...

    A model with it can be saved; who loads it must have imported the class before.

    Args:
        name: What `ModelConfig.backbone` is to hold.

    Returns:
        A decorator that returns the class as it is.

    Raises:
        UsageError: Another backbone has the name, or the class does not name its encoder's parts.
    """

    def register(backbone: _Registered) -> _Registered:
        if name in BACKBONES:
            raise UsageError(
                f"There is a backbone {name!r} already: {BACKBONES[name].__qualname__}. Give "
                f"{backbone.__qualname__} another name."
            )
        if not backbone.encoder_parts:
            raise UsageError(
                f"{backbone.__qualname__} has no encoder_parts. Name the submodules that `encode` "
                'uses, as in encoder_parts = ("stem", "down").'
            )
        BACKBONES[name] = backbone
        return backbone

    return register


def build_backbone(name: str, in_channels: int, **options: Any) -> Backbone:
    """Build a backbone by its name.

    Args:
        name: A key of `BACKBONES`.
        in_channels: Channels of the image.
        options: Further arguments of the backbone's class.

    Raises:
        UsageError: No backbone has that name, or it cannot be built with the options.
    """
    if name not in BACKBONES:
        hint = did_you_mean(name, BACKBONES)
        raise UsageError(
            f"Unknown backbone {name!r}.{hint} Choose from: {', '.join(BACKBONES)}. One of your "
            "own must be registered before (register_backbone)."
        )
    try:
        return BACKBONES[name](in_channels=in_channels, **options)
    except UniversalCTError:
        raise
    except BUILDING as error:
        raise UsageError(
            f"Backbone {name!r} cannot be built with {options!r:.200}: {error}."
        ) from error


def drop_outputs(net: nn.Module, *names: str) -> None:
    """Replace the output layers of a network: a head takes their place."""
    for name in names:
        setattr(net, name, nn.Identity())
