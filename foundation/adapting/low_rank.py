"""Low-rank adapters in a module's convolutions and linear layers, by peft.

Reference: LoRA, Hu et al., ICLR 2022 (arXiv 2106.09685). peft adapts 3-D convolutions too; it does
not adapt transposed ones, nor ones in groups, which stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foundation.errors import import_extra

_A, _B = "lora_A", "lora_B"


def adaptable(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of `module` that an adapter changes, by name, without their adapters."""
    found = {}
    for name, layer in module.named_modules():
        inside = any(part == "base_layer" or _is_lora(part) for part in name.split("."))
        plain = getattr(layer, "base_layer", layer)
        if not inside and _takes_adapters(plain):
            found[name] = plain
    return found


def adapted(module: nn.Module) -> dict[str, Any]:
    """Return peft's layers in `module`, by name."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, _A)}


def shapes(module: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that an adapter of this rank has for `module`."""
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in adaptable(module).items():
        weight: Any = layer.weight
        outputs, inputs, *kernel = weight.shape
        found[f"{name}.{_A}"] = (rank, inputs, *kernel)
        found[f"{name}.{_B}"] = (outputs, rank, *(1 for _ in kernel))
    return found


def inject(
    module: nn.Module,
    adapter: str,
    rank: int,
    alpha: float,
    *,
    seed: int = 1,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Give all adaptable layers of `module` an adapter.

    Parameters that asked for gradients do so still, and so do the new ones.

    Args:
        module: Any network or part of one; it is changed in place.
        adapter: Name by which peft's layers know the adapter.
        rank: Of the changes.
        alpha: The changes are multiplied by alpha / rank.
        seed: Of the start, where there are no `values`. An adapter that starts so changes nothing
            before it is trained.
        values: What the adapter learnt, named as in `shapes`.

    Raises:
        MissingExtraError: peft is not installed.
    """
    peft = import_extra("peft", "tune", "Adapters need")
    asked = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    targets = target_pattern(adaptable(module))
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    training = module.training
    if values is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, module, adapter)
    else:
        peft.inject_adapter_in_model(config, module, adapter, low_cpu_mem_usage=True)
        _fill(module, adapter, values)
    del module.peft_config  # peft would warn of a second adapter; the layers know theirs
    module.train(training)
    for parameter, wanted in asked:
        parameter.requires_grad_(wanted)


def target_pattern(layers: Iterable[str]) -> str:
    """Name the layers that peft changes, as it reads them from a configuration.

    Args:
        layers: Names of the layers.

    Returns:
        A regular expression of these names and no others.
    """
    # A regular expression, since peft takes names in a list for the ends of names.
    return "|".join(map(re.escape, layers))


def activate(module: nn.Module, adapter: str | None) -> None:
    """Activate one adapter of `module`; with None it computes what it did before it had any."""
    for layer in adapted(module).values():
        if adapter is not None:
            layer.set_adapter([adapter])
        layer.enable_adapters(adapter is not None)


def remove(module: nn.Module, adapter: str) -> None:
    """Delete an adapter. Layers that have no other one become plain layers again."""
    for name, layer in adapted(module).items():
        if adapter in layer.lora_A:
            layer.delete_adapter(adapter)
        if not layer.lora_A:
            _replace(module, name, layer.get_base_layer())


@torch.no_grad()
def merge(module: nn.Module, adapter: str) -> None:
    """Add what an adapter learnt to the weights, and delete all adapters."""
    for name, layer in adapted(module).items():
        plain = layer.get_base_layer()
        if adapter in layer.lora_A:
            # Not peft's own merging, which fails for convolutions of 1×1×1 voxels.
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            change = layer.scaling[adapter] * (up.flatten(1) @ down.flatten(1))
            plain.weight.add_(change.view_as(plain.weight))
        _replace(module, name, plain)


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)


def tensors(module: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return what an adapter learnt, named as in `shapes`; the module's own, not copies."""
    return {
        f"{name}.{part}": getattr(layer, part)[adapter].weight
        for name, layer in adapted(module).items()
        if adapter in layer.lora_A
        for part in (_A, _B)
    }


def _fill(module: nn.Module, adapter: str, values: Mapping[str, Tensor]) -> None:
    """Put copies of `values` in the place of an adapter's weights, which have no memory yet."""
    for name, layer in adapted(module).items():
        like = layer.get_base_layer().weight
        for part in (_A, _B):
            value = values[f"{name}.{part}"].to(like, copy=True)
            getattr(layer, part)[adapter].weight = nn.Parameter(value)


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of `module` as if it had no adapters."""
    return {
        name.replace(".base_layer.", "."): value
        for name, value in module.state_dict().items()
        if not any(map(_is_lora, name.split(".")))
    }


def below(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, by their names without it."""
    return {
        key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)
    }


def has_adapters(module: nn.Module) -> bool:
    """Return whether any layer of `module` is peft's."""
    return bool(adapted(module))


def _is_lora(part: str) -> bool:
    return part.startswith("lora_")


def _takes_adapters(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv3d:
        regular = layer.groups == 1 and layer.padding_mode == "zeros"
        return regular and set(layer.dilation) == {1}  # peft's layers forget what else there is
    return type(layer) is nn.Linear
