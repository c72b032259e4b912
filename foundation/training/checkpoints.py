"""The state of a run on disk: whole at every moment, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from foundation.errors import WeightsError
from foundation.files import file_sha256, read_sealed, replacing_folder, sealed_json

NETWORK, AVERAGE, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
BEST = "best.safetensors"
STATE = "state.json"
_FILES = "files"  # the key of the other files' SHA-256 in it
_SEPARATOR = "|"  # between a parameter's name and that of a tensor the optimiser keeps for it


@dataclass
class Checkpoint:
    """What a run goes on from.

    Args:
        network: What training changes, by name.
        average: The running average; None where the run keeps none.
        optimizer: See `optimizer_state`.
        progress: Plain values.
        best: The network at the best validation; None where the run does not return to it.
    """

    network: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Tensor]
    progress: dict[str, Any]
    best: Mapping[str, Tensor] | None = None


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the previous one stays until this one is complete.

    Its state holds the SHA-256 of the other files, and a sum of its own.
    """
    tensors = {NETWORK: checkpoint.network, OPTIMIZER: checkpoint.optimizer}
    for name, optional in ((AVERAGE, checkpoint.average), (BEST, checkpoint.best)):
        if optional is not None:
            tensors[name] = optional
    with replacing_folder(folder) as temporary:
        for name, values in tensors.items():
            save_file(dict(values), temporary / name)
        sums = {name: file_sha256(temporary / name) for name in tensors}
        text = sealed_json({**checkpoint.progress, _FILES: sums})
        (temporary / STATE).write_text(text, encoding="utf-8")
        for path in temporary.iterdir():  # on the disk before the rename is
            with path.open("rb") as file:
                os.fsync(file.fileno())


def load(folder: Path) -> Checkpoint:
    """Read what `save` wrote, on the CPU.

    Raises:
        WeightsError: A file is missing or damaged, or is not the one that was saved.
    """
    try:
        progress = read_sealed((folder / STATE).read_text(encoding="utf-8"))
        # A checkpoint of an older version has no sums; its files are read as they are.
        for name, sha256 in progress.pop(_FILES, {}).items():
            if file_sha256(folder / name) != sha256:
                raise ValueError(f"{name} has another SHA-256 than {STATE} says")
        average, best = (
            load_file(folder / name) if (folder / name).is_file() else None
            for name in (AVERAGE, BEST)
        )
        network, optimizer = load_file(folder / NETWORK), load_file(folder / OPTIMIZER)
        return Checkpoint(network, average, optimizer, progress, best)
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(
            f"The checkpoint {folder} cannot be read: {error}. Remove it to start again."
        ) from error


def whole(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, in the plain order of memory; gathered if it is sharded."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()  # every process must call this
    return tensor.cpu().clone(memory_format=torch.contiguous_format)


def gathered(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole copies of all of `values`."""
    return {name: whole(value) for name, value in values.items()}


@torch.no_grad()
def restore(target: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy saved values into tensors of the same names, sharded or not.

    Args:
        target: The tensors, which are changed.
        saved: Their values.
        what: What they are, for the error.

    Raises:
        WeightsError: The names are not the same.
    """
    if target.keys() != saved.keys():
        odd = sorted(target.keys() ^ saved.keys())[:3]
        raise WeightsError(f"The {what} of the checkpoint has other names, such as {odd}.")
    for name, tensor in target.items():
        tensor.copy_(_like(tensor, saved[name]))


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value` on the device of `tensor`, in its memory format, and sharded as it is."""
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device, tensor.dtype)
        return distribute_tensor(value, tensor.device_mesh, tensor.placements)
    return torch.empty_like(tensor).copy_(value)


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that the optimiser keeps, under the names of their parameters."""
    names: dict[Tensor, str] = {tensor: name for name, tensor in module.named_parameters()}
    found = {}
    for parameter, kept in optimizer.state.items():
        for key, value in kept.items():
            found[f"{names[parameter]}{_SEPARATOR}{key}"] = whole(torch.as_tensor(value))
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, saved: Mapping[str, Tensor]
) -> None:
    """Give the optimiser the tensors that `optimizer_state` returned."""
    parameters = dict(module.named_parameters())
    for name, value in saved.items():
        owner, key = name.rsplit(_SEPARATOR, 1)
        parameter = parameters[owner]
        # Steps are counted on the CPU; moments are kept as the parameter is, or sums would not be
        # taken in the same order as without the interruption.
        is_moment = value.shape == parameter.shape and value.dim() > 0
        kept = _like(parameter.detach(), value) if is_moment else value.clone()
        optimizer.state[parameter][key] = kept
