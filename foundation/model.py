"""The universal model: a backbone and the text-driven head, composed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foundation.adapting import adapters
from foundation.adapting.classes import Expectation, Kind, add_class
from foundation.config import ModelConfig, Origin, TextSpec
from foundation.errors import UsageError
from foundation.imaging.result import Segmentation
from foundation.imaging.volumes import Source
from foundation.inference.predict import segment_volume
from foundation.networks.backbones import Backbone, build_backbone
from foundation.networks.branches import Branch, read_out, read_out_at
from foundation.networks.head import TextDrivenHead


class Encoder(nn.Module):
    """The backbone's encoder alone, for transfer: a CT patch in, its feature pyramid out.

    channels, strides: of the levels, finest first. Shares its weights with the model.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = backbone.channels
        self.strides = backbone.strides
        self.divisor = backbone.divisor

    def forward(self, image: Tensor) -> list[Tensor]:
        """image (B, C, X, Y, Z), windowed to [0, 1] → (B, channels[i], X/strides[i], …) each."""
        return self.backbone.encode(image)


class UniversalModel(nn.Module):
    """One network for every class that has a prompt embedding.

    config: architecture, classes, text encoder and preprocessing.
    prompt_embedding (K, D): one row a class, in the order of `config.classes`; zeros if not given.
    """

    prompt_embedding: Tensor

    def __init__(self, config: ModelConfig, prompt_embedding: Tensor | None = None) -> None:
        super().__init__()
        expected = (len(config.classes), config.text.dim)
        if prompt_embedding is None:
            prompt_embedding = torch.zeros(expected)
        if tuple(prompt_embedding.shape) != expected:
            raise UsageError(
                f"prompt_embedding has shape {tuple(prompt_embedding.shape)}; "
                f"the configuration has {expected[0]} classes and embeddings of {expected[1]}."
            )
        self.config = config
        self.backbone = build_backbone(
            config.backbone, len(config.preprocessing.hu_windows), **config.backbone_options
        )
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
        self.origin: Origin | None = None  # set by `from_pretrained`
        self._instance_norm = any(isinstance(m, nn.InstanceNorm3d) for m in self.backbone.modules())
        # Saved beside the weights, not among them: it grows by a row with each class.
        self.register_buffer("prompt_embedding", prompt_embedding.float(), persistent=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in channel order."""
        return self.config.class_names

    @property
    def encoder(self) -> Encoder:
        """The feature pyramid for transfer, sharing this model's weights."""
        return Encoder(self.backbone)

    def forward(self, image: Tensor, channels: Sequence[int] | None = None) -> Tensor:
        """image (B, C, X, Y, Z), windowed to [0, 1] → logits (B, K, X, Y, Z).

        channels: which classes to compute, as indices into `classes`; all if not given.

        Raises:
            UsageError: a spatial size is not a multiple of the backbone's divisor, or a backbone
                with instance normalisation is left with a single voxel at its deepest level.
        """
        self._check_patch(tuple(image.shape[2:]))
        pyramid = self.backbone.encode(image)
        return read_out(self, self.backbone.decode(pyramid), pyramid, channels)

    def logits_at(self, image: Tensor, voxels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K, M) at flat voxel indices (B, M) only, and the features (B, C, M) there.

        For losses on a sample of the voxels: the head's generated convolutions see one voxel each,
        so nothing is approximated.

        Raises:
            UsageError: as `forward`.
        """
        self._check_patch(tuple(image.shape[2:]))
        pyramid = self.backbone.encode(image)
        return read_out_at(self, self.backbone.decode(pyramid), pyramid, voxels)

    def _check_patch(self, shape: tuple[int, ...]) -> None:
        name, divisor = self.config.backbone, self.backbone.divisor
        if any(size % divisor for size in shape):
            raise UsageError(f"The patch is {shape} voxels; {name} needs multiples of {divisor}.")
        deepest = self.backbone.strides[-1]
        if self._instance_norm and all(size == deepest for size in shape):
            raise UsageError(
                f"The patch is {shape} voxels, which leaves {name} a single one at its deepest "
                f"level, too few for instance normalisation. Make one side {2 * deepest} or more."
            )

    def add_class(
        self,
        name: str,
        *,
        prompt: str | None = None,
        parent: str | None = None,
        embedding: Tensor | None = None,
        text: TextSpec | None = None,
        kind: Kind = "prompt",
    ) -> Expectation:
        """Add a class by its prompt, as the last channel; returns what to expect before training.

        No weight and no other class changes. prompt: the sentence; made from `name` if not given.
        parent: the organ that a lesion lies in. See `foundation.adapting.classes.add_class`.

        Raises:
            UsageError: the model has that class, or `embedding` cannot be mixed with its own.
            MissingExtraError, HubError, WeightsError: the encoder is needed and cannot be used.
        """
        return add_class(
            self, name, prompt=prompt, parent=parent, embedding=embedding, text=text, kind=kind
        )

    def add_adapter(self, name: str, **options: Any) -> None:
        """Add an untrained adapter and activate it; see `foundation.adapting.adapters`."""
        adapters.add_adapter(self, name, **options)

    def set_adapter(self, name: str | None) -> None:
        """Activate an adapter; None: the model as it was; see `foundation.adapting.adapters`."""
        adapters.set_adapter(self, name)

    def delete_adapter(self, name: str | None = None) -> None:
        """Delete an adapter, the active one if no name is given."""
        adapters.delete_adapter(self, name)

    def merge_adapter(
        self, name: str | None = None, *, new_name: str | None = None
    ) -> UniversalModel:
        """A plain model with an adapter in its weights; see `foundation.adapting.adapters`."""
        return adapters.merge_adapter(self, name, new_name=new_name)

    def load_adapter(
        self, name_or_path: str | Path, name: str | None = None, **options: Any
    ) -> str:
        """Load an adapter and activate it; see `foundation.hub.load.load_adapter`."""
        from foundation.hub.load import load_adapter

        return load_adapter(self, name_or_path, name, **options)

    def save_adapter(self, folder: str | Path, name: str | None = None, **options: Any) -> Path:
        """Write an adapter's folder; see `foundation.hub.adapter_files.save_adapter`."""
        from foundation.hub.adapter_files import save_adapter

        return save_adapter(self, folder, name, **options)

    def push_adapter(self, repo_id: str, name: str | None = None, **options: Any) -> str:
        """Upload an adapter; see `foundation.hub.upload.push_adapter`."""
        from foundation.hub.upload import push_adapter

        return push_adapter(self, repo_id, name, **options)

    def segment(
        self,
        ct: Source,
        *,
        classes: str | Sequence[str] | None = None,
        device: str | torch.device | None = None,
        overlap: float | None = None,
        postprocess: bool = True,
        progress: bool = True,
    ) -> Segmentation:
        """Segment a CT: a NIfTI path, a nibabel image or (array in HU, affine).

        classes: names or aliases; all if not given. device: "auto", "cpu", "cuda:1", "mps"; the
        model moves there. See `foundation.inference.predict.segment_volume`.

        Raises:
            VolumeError: the CT cannot be read.
            UsageError: unknown class, bad overlap, or a device that is not there.
        """
        return segment_volume(
            self,
            ct,
            classes=classes,
            device=device,
            overlap=overlap,
            postprocess=postprocess,
            progress=progress,
        )
