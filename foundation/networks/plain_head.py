"""A backbone with a plain 1×1×1 convolution as its head: what transfer is measured by.

The published comparison drops the text-driven head and keeps the backbone alone. Here a class is a
channel, with a softmax over background and classes, or a sigmoid each. Inference, validation and
evaluation are those of every other model: `segment_volume` and `evaluate` take it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from foundation.adapting.low_rank import plain_state
from foundation.config import ClassSpec, ModelConfig, Preprocessing, TextSpec
from foundation.errors import UsageError, WeightsError
from foundation.hub.convert import check_state, shapes_of
from foundation.hub.saved import (
    CONFIG,
    WEIGHTS,
    read_tensors,
    stored,
    verify_sums,
    write_sums,
    written_at_once,
)
from foundation.model import UniversalModel
from foundation.networks.backbones import build_backbone
from foundation.pretraining.network import ONE_HOT

Activation = Literal["softmax", "sigmoid"]
FORMAT_VERSION = 1
_FILES = (CONFIG, WEIGHTS)


class LinearHead(nn.Module):
    """One 1×1×1 convolution, a channel a class; the softmax's first channel is background."""

    def __init__(self, full_channels: int, classes: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.first = 1 if activation == "softmax" else 0  # channel of the first class
        self.convolution = nn.Conv3d(full_channels, self.first + classes, 1)

    def generate(self, deep: Tensor, rows: Tensor) -> Tensor:
        """Channels (k,) of the classes whose one-hot rows (k, K) are given.

        Nothing is generated from the bottleneck feature `deep`: the name is that of the text-driven
        head's call, in whose place this one is made.
        """
        return rows.argmax(1) + self.first

    def forward(self, full: Tensor, channels: Tensor) -> Tensor:
        """full (B, C, X, Y, Z), channels (k,) → logits (B, k, X, Y, Z), above 0 inside the mask.

        Of a softmax: how far a class is ahead of the likeliest other channel, or behind it, so that
        0.5 is where the largest probability changes hands. A class's own probability would leave
        voxels to background of which three classes share the rest.
        """
        scores: Tensor = self.convolution(full)
        if self.activation == "sigmoid":
            return scores[:, channels]
        scores = scores.float()  # differences of large numbers, in half precision on a GPU
        best, where = scores.max(1, keepdim=True)
        second = scores.scatter(1, where, -torch.inf).amax(1, keepdim=True)
        is_best = channels.view(1, -1, 1, 1, 1) == where
        return scores[:, channels] - torch.where(is_best, second, best)

    def relative(self, sampled: Tensor) -> Tensor:
        """Features (B, C, M) → logits (B, K, M), of a softmax those relative to background."""
        weight, bias = self.convolution.weight, self.convolution.bias
        scores = functional.conv1d(sampled, weight.flatten(2), bias).float()
        return scores if self.activation == "sigmoid" else scores[:, 1:] - scores[:, :1]


class LinearNetwork(nn.Module):
    """A backbone and a `LinearHead`, with what `sliding_window.Network` asks for.

    config: its text encoder is "one-hot": row k of prompt_embedding (K, K) says channel k.

    Raises:
        UsageError: the activation is neither softmax nor sigmoid, or there is no such backbone.
    """

    prompt_embedding: Tensor

    def __init__(self, config: ModelConfig, activation: Activation) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise UsageError(f"activation is {activation!r}; choose softmax or sigmoid.")
        count = len(config.classes)
        text = TextSpec(ONE_HOT, template="{}", pooling="none", normalised=True, dim=count)
        self.config = replace(config, text=text, standardise_text=False, branches=())
        self.activation = activation
        self.backbone = build_backbone(
            config.backbone, len(config.preprocessing.hu_windows), **config.backbone_options
        )
        # `Any`: the protocol says text-driven, and reading out makes the two calls that it answers.
        self.head: Any = LinearHead(self.backbone.full_channels, count, activation)
        self.branches = nn.ModuleList()
        self.register_buffer("prompt_embedding", torch.eye(count), persistent=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in channel order, without background."""
        return self.config.class_names

    def forward(self, image: Tensor) -> Tensor:
        """image (B, C, X, Y, Z), windowed to [0, 1] → logits (B, K, X, Y, Z), see `LinearHead`."""
        full = self.backbone.decode(self.backbone.encode(image))
        logits: Tensor = self.head(full, self.head.generate(full, self.prompt_embedding))
        return logits

    def probabilities(self, image: Tensor) -> Tensor:
        """Softmax (B, 1 + K, X, Y, Z), background first and summing to 1; or sigmoids (B, K, …)."""
        full = self.backbone.decode(self.backbone.encode(image))
        scores: Tensor = self.head.convolution(full).float()
        return scores.softmax(1) if self.activation == "softmax" else scores.sigmoid()

    def logits_at(self, image: Tensor, voxels: Tensor) -> tuple[Tensor, Tensor]:
        """For the loss, as `UniversalModel.logits_at`: logits (B, K, M) at flat voxel indices.

        Of a softmax they are relative to background: what `scan_losses` takes. Beside them the
        features (B, C, M).
        """
        sampled = self.backbone.decode(self.backbone.encode(image)).flatten(2)
        if voxels.shape[1] != sampled.shape[2]:  # all of them come in their order
            sampled = sampled.gather(2, voxels[:, None].expand(-1, sampled.shape[1], -1))
        return self.head.relative(sampled), sampled


def drop_head(
    model: UniversalModel,
    classes: Sequence[str],
    activation: Activation = "softmax",
    *,
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
) -> LinearNetwork:
    """A copy of a model's backbone, with an untrained linear head for other classes.

    preprocessing: instead of the model's own; the network must have been made for as many windows.
    seed: of the head's weights.

    Raises:
        UsageError: another number of HU windows, no class, or an unknown activation.
    """
    own = model.config.preprocessing
    chosen = own if preprocessing is None else preprocessing
    if len(chosen.hu_windows) != len(own.hu_windows):
        raise UsageError(
            f"{model.config.name} reads {len(own.hu_windows)} HU windows, not "
            f"{len(chosen.hu_windows)}: {chosen.hu_windows}. Give as many, or keep its own."
        )
    if not classes:
        raise UsageError("No class to learn was given; name at least one.")
    config = replace(
        model.config,
        classes=tuple(ClassSpec(name, name) for name in classes),
        branches=(),
        preprocessing=chosen,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LinearNetwork(config, activation)
    network.backbone.load_state_dict(plain_state(model.backbone))
    return network.eval()


# --- files ----------------------------------------------------------------------------------------


def save_linear(network: LinearNetwork, folder: str | Path) -> Path:
    """Write a folder that `load_linear` reads; nothing is left if writing fails.

    Raises:
        UsageError: `folder` is a file, or holds other files.
    """
    folder = Path(folder)
    content = {
        "format_version": FORMAT_VERSION,
        "activation": network.activation,
        "network": json.loads(network.config.to_json()),
    }
    with written_at_once(folder, _FILES) as temporary:
        text = json.dumps(content, indent=2) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        state = {name: stored(tensor, None) for name, tensor in network.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        write_sums(temporary, _FILES)
    return folder


def load_linear(folder: str | Path) -> LinearNetwork:
    """Read what `save_linear` wrote, on the CPU, in evaluation mode.

    Raises:
        WeightsError: a file is missing or does not have its SHA-256; it is no linear network; or
            keys or shapes of the weights are not exactly the network's.
    """
    folder = Path(folder)
    verify_sums(folder, _FILES)
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError("another format version; update universal-ct")
        config = ModelConfig.from_json(json.dumps(content["network"]), str(path))
        network = LinearNetwork(config, content["activation"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} describes no backbone with a linear head: {error!r}. A model with a "
            "text-driven head is loaded by from_pretrained."
        ) from error
    state = read_tensors(folder / WEIGHTS)
    check_state(shapes_of(network), state, str(folder))
    network.load_state_dict(state)
    return network.eval()
