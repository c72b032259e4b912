"""State dicts with the published keys and shapes, filled by a recipe that any framework can follow.

The numbers in `parity/` came from running the published code with exactly these weights and this
input; so agreement with them is agreement with the published system, without any of its files.
"""

import json
from pathlib import Path

import numpy as np
import torch

PARITY = Path(__file__).parent / "parity"
INPUT_INDEX = 1000  # the place in the sequence of tensors that the input takes


def hashed(shape, index):
    """Full-rank pseudo-random numbers in [-1, 1), exact on every machine; one `index` a tensor."""
    mask = np.uint64(0xFFFFFFFF)
    h = np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(2654435761)
    h = (h + np.uint64(index + 1) * np.uint64(2246822519)) & mask
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        h ^= h >> np.uint64(shift)
        h = (h * np.uint64(factor)) & mask
    h ^= h >> np.uint64(16)
    return (h.astype(np.float64) / 2**31 - 1).reshape(shape)


def published_keys(backbone):
    """Key → shape of the published checkpoint; integer tensors as {"int64": shape}."""
    return json.loads((PARITY / f"{backbone}_keys.json").read_text())


def published_state(backbone, constants=None):
    """The published state dict by the recipe; `constants` gives the integer tensors' values."""
    keys = published_keys(backbone)
    state = {}
    for index, key in enumerate(sorted(keys)):
        shape = keys[key]
        if isinstance(shape, dict):
            value = (constants or {}).get(key)
            state[key] = torch.zeros(shape["int64"], dtype=torch.int64) if value is None else value
        else:
            state[key] = torch.from_numpy(_filled(key, shape, index).astype(np.float32))
    return state


def empty_state(backbone):
    """The published keys and shapes; the zeros take no memory. For tests of names alone."""
    state = {}
    for key, shape in published_keys(backbone).items():
        whole = isinstance(shape, dict)
        zero = torch.zeros((), dtype=torch.int64 if whole else torch.float32)
        state[key] = zero.expand(shape["int64"] if whole else shape)
    return state


def _filled(key, shape, index):
    name = key.rsplit(".", 1)[-1]
    if name == "running_mean":
        return np.zeros(shape)
    if name == "running_var":
        return np.ones(shape)
    u = hashed(shape, index)
    if key == "organ_embedding":
        return u
    if name == "weight" and len(shape) == 1:  # only normalisations have weights with one axis
        return 1 + 0.2 * u
    if name == "relative_position_bias_table":
        return 0.5 * u
    if len(shape) == 1:
        return 0.2 * u
    scale = np.sqrt(6 * shape[0] / np.prod(shape)) * (0.6 if key == "controller.weight" else 1)
    return u * scale


def parity_input(size):
    """(1, 1, S, S, S) in [0, 1]: waves, so that every axis differs, and noise."""
    first, second, third = np.meshgrid(*3 * [np.arange(size)], indexing="ij")
    image = 0.5 + 0.2 * np.sin(0.11 * first + 0.07 * second)
    image += 0.2 * np.sin(0.05 * third + 0.003 * second * first)
    image += 0.1 * hashed((size, size, size), INPUT_INDEX)
    return torch.from_numpy(image.astype(np.float32))[None, None]
