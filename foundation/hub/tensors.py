"""Tensors in safetensors files: what the header says, the values, and how they are stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foundation.errors import WeightsError

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}  # of the format; those that no network of ours has are left out


# What was read of an open file counts as memory until it is closed.
_READ_BYTES = 32_000_000


def read_header(path: Path) -> dict[str, Tensor]:
    """Read names, shapes and types of the tensors of a safetensors file, and none of its values.

    Args:
        path: The file.

    Returns:
        Name → a tensor on the meta device.

    Raises:
        WeightsError: It is not one, or has a tensor of a type that is not known here.
    """
    header = {}
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            part = file.get_slice(name)
            kind = part.get_dtype()
            if kind not in _DTYPES:
                raise WeightsError(
                    f"{path} stores {name} as {kind}; allowed are {', '.join(_DTYPES)}."
                )
            shape = part.get_shape()
            header[name] = torch.empty(shape, dtype=_DTYPES[kind], device="meta")
    return header


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file onto the CPU, one after the other.

    Args:
        path: The file.

    Returns:
        Name → tensor, which does not look into the file: that may be replaced. Floating-point
        numbers are float32.

    Raises:
        WeightsError: It is not one.
    """
    tensors: dict[str, Tensor] = {}
    names = list(reversed(read_header(path)))  # the last is read first
    while names:
        read = 0
        with opened(path) as file:
            while names and read < _READ_BYTES:
                tensor = file.get_tensor(name := names.pop())
                kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
                tensors[name] = tensor.to(kind, copy=True)
                read += tensor.nbytes
                del tensor
    return tensors


def stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Make a copy of a tensor to be written.

    Args:
        tensor: Any tensor.
        dtype: Of the copy, where the tensor is of floating-point numbers; its own if not given.

    Returns:
        A contiguous copy on the CPU.
    """
    tensor = tensor.detach().cpu()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    # A copy of its own: safetensors refuses tensors that share memory.
    return tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; what it or its reader finds wrong is an error of ours.

    Args:
        path: The file.

    Yields:
        What `safetensors.safe_open` gives.

    Raises:
        WeightsError: It is no such file, or a tensor of it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}.") from error


def sort_metadata(path: Path) -> None:
    """Give a safetensors file its metadata in alphabetical order.

    Its writer takes a random one. Then a model that is saved again would have another SHA-256, and
    its records would no longer name it.
    """
    content = path.read_bytes()
    start = 8  # the length of the header, which is JSON, comes first
    end = start + int.from_bytes(content[:start], "little")
    header = json.loads(content[start:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= end - start  # the same signs in another order; the rest is spaces
    path.write_bytes(content[:start] + text.ljust(end - start) + content[end:])
