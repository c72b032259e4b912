"""The text-driven model: one network for every class that has a prompt embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foundation.adapting import adapters
from foundation.adapting.classes import Expectation, add_class
from foundation.config import ModelConfig
from foundation.errors import UsageError
from foundation.model.base import Model
from foundation.networks.branches import Branch, rows_by_branch, trained_rows
from foundation.networks.head import TextDrivenHead, as_volume, is_recorded

PROMPTS = "prompt_embedding"  # the prompts' key in a state dict


class UniversalModel(Model):
    """One network for every class that has a prompt embedding.

    Args:
        config: Architecture, classes, text encoder and preprocessing.
        prompt_embedding: (K, D), one row a class, in the order of `config.classes`. Without it the
            rows are zero, and the model computes nothing before a state dict brings them.

    Raises:
        UsageError: `prompt_embedding` has another shape than `config` asks for; or the backbone
            cannot be built.
    """

    config: ModelConfig
    head: TextDrivenHead
    prompt_embedding: Tensor

    def __init__(self, config: ModelConfig, prompt_embedding: Tensor | None = None) -> None:
        expected = (len(config.classes), config.text.dim)
        if prompt_embedding is None:
            prompt_embedding = torch.zeros(expected)
        if tuple(prompt_embedding.shape) != expected:
            raise UsageError(
                f"prompt_embedding has shape {tuple(prompt_embedding.shape)}; "
                f"the configuration has {expected[0]} classes and embeddings of {expected[1]}."
            )
        super().__init__(config)
        self.head = TextDrivenHead(
            self.backbone.channels[-1],
            self.backbone.full_channels,
            config.text.dim,
            config.standardise_text,
        )
        self.branches = nn.ModuleList(
            Branch(spec, self.backbone, config) for spec in config.branches
        )
        self.adapters = adapters.Adapters(loaded_branches=len(config.branches))
        self.register_buffer(PROMPTS, prompt_embedding.float())
        self._checked_prompts: tuple[Tensor, ...] = ()  # a tuple, so that they are not registered

    def forward(self, image: Tensor, channels: Sequence[int] | None = None) -> Tensor:
        """Compute the logits of classes.

        Args:
            image: (B, C, X, Y, Z), preprocessed.
            channels: Which classes, as indices into `classes`; None, all.

        Returns:
            (B, k, X, Y, Z), in the order of `channels`.

        Raises:
            UsageError: The image does not fit, see `features`; there is no such channel; or the
                prompts are all zero.
        """
        self._check_prompts()
        wanted = self._wanted(channels)
        pyramid = self.features(image)
        return self._compute(pyramid, self.backbone.decode(pyramid), wanted)

    def logits(self, image: Tensor, prompts: Tensor) -> Tensor:
        """Compute the logits of any classes from their prompts alone, by the model's own head.

        Args:
            image: (B, C, X, Y, Z), preprocessed.
            prompts: Prompt embeddings (K, D), of the model's text encoder.

        Returns:
            (B, K, X, Y, Z).

        Raises:
            UsageError: The image or the prompts have another shape.
        """
        dim = self.config.text.dim
        if prompts.ndim != 2 or prompts.shape[1] != dim:
            raise UsageError(f"prompts has shape {tuple(prompts.shape)}; give (K, {dim}).")
        pyramid = self.features(image)
        full = self.backbone.decode(pyramid)
        logits: Tensor = self.head(full, self.head.generate(pyramid[-1], prompts))
        return logits

    def logits_at(self, image: Tensor, voxels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits at some voxels only, for a loss on a sample of them.

        The head's generated convolutions see one voxel each, so nothing is approximated.

        Args:
            image: (B, C, X, Y, Z), preprocessed.
            voxels: Flat indices (B, M).

        Returns:
            Logits (B, K, M) of all classes, and the features (B, C, M) there.

        Raises:
            UsageError: As `forward`.
        """
        self._check_prompts()
        pyramid = self.features(image)
        full = self.backbone.decode(pyramid)
        sampled = self.head.sample(full, voxels)
        return self._compute(pyramid, full, self._wanted(None), voxels, sampled), sampled

    def _compute(
        self,
        pyramid: Sequence[Tensor],
        full: Tensor,
        wanted: list[int],
        voxels: Tensor | None = None,
        sampled: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, k, X, Y, Z); of `voxels` (B, M), whose features are `sampled`, (B, k, M)."""
        own = trained_rows(self.config)
        order = [channel for channel in wanted if channel < own]
        parts: list[Tensor] = []
        if order:
            generated = self.head.generate(pyramid[-1], self._prompts(order))
            if sampled is None:
                parts.append(self.head(full, generated))
            else:
                read = self.head.read(as_volume(sampled), generated, None)
                parts.append(read.flatten(2))
        for index, channels in rows_by_branch(self.config):
            mine = [channel for channel in wanted if channel in channels]
            if mine:
                places = [channels.index(channel) for channel in mine]
                prompts = self._prompts(mine)
                branch = self.branches[index]
                parts.append(branch(self.head, full, pyramid, prompts, places, voxels))
                order += mine
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if order == wanted:
            return logits
        place = {channel: index for index, channel in enumerate(order)}  # the last of each counts
        return logits[:, [place[channel] for channel in wanted]]

    def _prompts(self, channels: list[int]) -> Tensor:
        """The prompts of some classes, (k, D)."""
        # Of neighbours not a copy: the same memory gives the same sums.
        first, end = channels[0], channels[-1] + 1
        return self.prompt_embedding[
            slice(first, end) if channels == list(range(first, end)) else channels
        ]

    def _wanted(self, channels: Sequence[int] | None) -> list[int]:
        every = range(len(self.classes))
        try:
            return [every[channel] for channel in (every if channels is None else channels)]
        except (TypeError, IndexError):
            raise UsageError(
                f"channels is {channels}; give indices into `classes`, 0 to {len(every) - 1}."
            ) from None

    def _check_prompts(self) -> None:
        """Refuse to compute from prompts that nobody gave: every class would be the same."""
        rows = self.prompt_embedding
        if is_recorded() or torch.compiler.is_compiling() or rows.is_meta:
            return
        if not any(checked is rows for checked in self._checked_prompts):
            if not rows.any():
                raise UsageError(
                    f"The prompt embeddings of {self.config.name!r} are all zero. Give them to "
                    "UniversalModel(config, prompt_embedding), or load a state dict."
                )
            self._checked_prompts = (rows,)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        rows, errors = state_dict.get(prefix + PROMPTS), arguments[-1]
        if rows is not None and len(rows) != len(self.classes):
            errors.append(
                f"the weights have {len(rows)} classes, the model has {len(self.classes)}. Build "
                "it from the configuration of the weights, or add the same classes to it first."
            )

    def add_class(self, name: str, **options: Any) -> Expectation:
        """Add a class by its prompt, as the last channel. No weight and no other class changes.

        Args:
            name: Name of the class.
            **options: `prompt`, `parent`, `embedding`, `text` and `kind` of
                `foundation.adapting.classes.add_class`.

        Returns:
            What to expect of the class before training.

        Raises:
            UsageError: The model has that class, or `embedding` cannot be mixed with its own.
            MissingExtraError: The encoder is needed and is not installed.
            HubError: The encoder's weights cannot be had.
            WeightsError: The encoder is another one than that of the weights.
        """
        return add_class(self, name, **options)

    def add_adapter(self, name: str, **options: Any) -> None:
        """Add an untrained adapter and activate it; see `foundation.add_adapter`."""
        adapters.add_adapter(self, name, **options)

    def set_adapter(self, name: str | None) -> None:
        """Activate an adapter; None: the model as it was; see `foundation.set_adapter`."""
        adapters.set_adapter(self, name)

    def delete_adapter(self, name: str | None = None) -> None:
        """Delete an adapter; the active one if no name is given."""
        adapters.delete_adapter(self, name)

    def merge_adapter(
        self, name: str | None = None, *, new_name: str | None = None
    ) -> UniversalModel:
        """Return a plain model with an adapter in its weights; see `foundation.merge_adapter`."""
        return adapters.merge_adapter(self, name, new_name=new_name)

    def load_adapter(
        self, name_or_path: str | Path, name: str | None = None, **options: Any
    ) -> str:
        """Load an adapter, activate it and return its name; see `foundation.load_adapter`."""
        from foundation.hub.load import load_adapter

        return load_adapter(self, name_or_path, name, **options)

    def save_adapter(self, folder: str | Path, name: str | None = None, **options: Any) -> Path:
        """Write the folder of an adapter; see `foundation.save_adapter`."""
        from foundation.hub.adapter_files import save_adapter

        return save_adapter(self, folder, name, **options)

    def push_adapter(self, repo_id: str, name: str | None = None, **options: Any) -> str:
        """Upload an adapter and return the address of the commit; see `foundation.push_adapter`."""
        from foundation.hub.upload import push_adapter

        return push_adapter(self, repo_id, name, **options)
