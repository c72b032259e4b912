"""A backbone as a row of stages, for what goes by depth: learning rates, kept activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from foundation.networks.backbones import Backbone

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def stages(backbone: Backbone) -> dict[str, nn.Module]:
    """Return the modules with parameters that a backbone calls one by one, in no special order.

    Looks through lists of modules, and through modules that are made of such lists: a Swin
    transformer's stages are its blocks.

    Args:
        backbone: Any one of `networks.backbones`.

    Returns:
        The modules by their names in the backbone.
    """
    # Of a backbone of MONAI's, the code calls the parts and not the whole.
    through = {id(module) for module in (backbone, getattr(backbone, "net", None))}

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            lists = any(isinstance(part, _CONTAINERS) for part in child.children())
            if id(child) in through or isinstance(child, _CONTAINERS) or lists:
                yield from walk(child, f"{prefix}{name}.")
            elif any(True for _ in child.parameters()):
                yield f"{prefix}{name}", child

    return dict(walk(backbone, ""))


@torch.no_grad()
def in_order_of_use(backbone: Backbone, in_channels: int) -> list[str]:
    """Return the names of the stages in the order in which an image meets them.

    Args:
        backbone: Gets the smallest image that it takes, which is empty.
        in_channels: Of that image.

    Returns:
        Names of `stages`; those that are not used come last.
    """
    found = stages(backbone)
    used: list[str] = []

    def recording(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any, **options: Any) -> Any:
            used.append(name)
            return forward(*inputs, **options)

        return call

    for name, stage in found.items():  # not by hooks: DiNTS calls `forward` itself
        stage.forward = recording(name, stage.forward)
    was_training = backbone.training
    backbone.eval()
    size = 2 * backbone.divisor
    device = next(backbone.parameters()).device
    backbone.decode(backbone.encode(torch.zeros(1, in_channels, size, size, size, device=device)))
    backbone.train(was_training)
    for stage in found.values():
        del stage.forward  # the class's own shows again
    return list(dict.fromkeys([*used, *found]))


def rate_factors(backbone: Backbone, in_channels: int, layer_decay: float) -> dict[str, float]:
    """Return the share of the full learning rate that each parameter of a backbone has.

    The last of n stages has `layer_decay`, the first `layer_decay` to the power of n, and so have
    parameters outside of all stages, as positions are: what lies above the backbone has 1.

    Args:
        backbone: What is trained.
        in_channels: Of its images.
        layer_decay: In (0, 1].

    Returns:
        Shares by the parameters' names in the backbone.

    Reference:
        BEiT (arXiv 2106.08254); timm counts layers in the same way.
    """
    names = [name for name, _ in backbone.named_parameters()]
    if layer_decay == 1:
        return dict.fromkeys(names, 1.0)
    order = in_order_of_use(backbone, in_channels)
    factors = {}
    for name in names:
        places = (i for i, stage in enumerate(order) if name.startswith(f"{stage}."))
        factors[name] = layer_decay ** (len(order) - next(places, 0))
    return factors


def checkpoint_activations(backbone: Backbone) -> None:
    """Keep only the inputs of each stage for the backward pass, which computes the rest again."""

    def cheaply(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*inputs, **options)
            return checkpoint(forward, *inputs, use_reentrant=False, **options)

        return call

    for stage in stages(backbone).values():
        stage.forward = cheaply(stage.forward)
