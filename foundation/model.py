"""Models in memory: a backbone and a head, composed, with methods for what users do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foundation.adapting import adapters
from foundation.adapting.classes import Expectation, add_class
from foundation.config import ModelConfig, NetworkConfig, Origin
from foundation.errors import UsageError, WeightsError, listed
from foundation.imaging.result import Segmentation
from foundation.imaging.volumes import Source
from foundation.inference.predict import segment_volume
from foundation.networks.backbones import build_backbone
from foundation.networks.branches import Branch, rows_by_branch, trained_rows
from foundation.networks.encoder import Encoder, check_image
from foundation.networks.head import TextDrivenHead, is_recorded
from foundation.networks.plain_head import PlainHead

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from foundation.inference.options import InferenceOptions

PROMPTS = "prompt_embedding"  # the prompts' key in a state dict


class Model(nn.Module):
    """A backbone, on which a subclass puts a head.

    Args:
        config: Architecture, classes and preprocessing.

    Raises:
        UsageError: No backbone has the name in `config`, or it does not take the options.
    """

    config: NetworkConfig
    head: nn.Module

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(
            config.backbone, config.preprocessing.channels, **config.backbone_options
        )
        self.config = replace(config, divisor=self.backbone.divisor)
        self.origin: Origin | None = None
        self._as_loaded: object = None

    def __repr__(self) -> str:
        pre, names = self.config.preprocessing, self.classes
        count = sum(parameter.numel() for parameter in self.parameters())
        windows = ", ".join(f"{low:g} to {high:g}" for low, high in pre.hu_windows)
        spacing, patch = (
            " × ".join(f"{n:g}" for n in of) for of in (pre.spacing_mm, pre.patch_size)
        )
        return (
            f"{type(self).__name__} {self.config.name!r}: backbone {self.config.backbone}, "
            f"{count / 1e6:.2f} M parameters, {str(self.dtype).removeprefix('torch.')} on "
            f"{self.device}, licence {self.config.licence}\n"
            f"  {len(names)} classes ({self.config.activation}): {listed(names, 4)}\n"
            f"  input: {pre.channels} channels (HU {windows}), {pre.orientation}, {spacing} mm, "
            f"patches of {patch} voxels, multiples of {self.config.divisor}"
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in channel order, without background."""
        return self.config.class_names

    def set_origin(self, origin: Origin) -> None:
        """Note where the weights that the model has now came from; `from_pretrained` does it."""
        self.origin, self._as_loaded = origin, self._state()

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the file of the weights; None once they or the classes are others."""
        if self.origin is None or self._as_loaded != self._state():
            return None
        return self.origin.weights_sha256

    def _state(self) -> object:
        # PyTorch counts the writes to a tensor; moving the model to a device is none.
        weights = [(id(t), None if t.is_inference() else t._version) for t in self.parameters()]
        return self.config, weights

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of number of the weights."""
        return next(self.parameters()).dtype

    @property
    def encoder(self) -> Encoder:
        """The encoder for transfer, always the same object; it shares this model's weights."""
        # Not registered as a submodule: its weights would stand in the state dict twice.
        encoder: Encoder | None = self.__dict__.get("_encoder")
        if encoder is None:
            encoder = self.__dict__["_encoder"] = Encoder(self.backbone, self.config)
        encoder.follow(self.backbone, self.config)
        return encoder

    def features(self, image: Tensor) -> list[Tensor]:
        """Compute the feature pyramid, finest level first.

        Args:
            image: (B, C, X, Y, Z), preprocessed.

        Returns:
            One tensor a level, (B, C_i, X / stride_i, Y / stride_i, Z / stride_i).

        Raises:
            UsageError: The image has another number of axes or channels than the model reads, or a
                size that it cannot take.
        """
        if not is_recorded():
            check_image(image, self.backbone, self.config)
        return self.backbone.encode(image)

    def segment(
        self,
        ct: Source,
        *,
        classes: str | Sequence[str] | None = None,
        **options: Unpack[InferenceOptions],
    ) -> Segmentation:
        """Segment a CT.

        Args:
            ct: Path of a NIfTI file, nibabel image, or (array in HU, affine).
            classes: Names or aliases; all if not given.
            **options: `device`: "auto", "cpu", "cuda:1", "mps"; the model moves there. `overlap`:
                share of a window that its neighbour covers; the weights' own if not given.
                `postprocess`: clean the masks up, True if not given. `progress`: show a bar in a
                terminal, True if not given. See `foundation.inference.predict.segment_volume`.

        Raises:
            VolumeError: The CT cannot be read.
            UsageError: Unknown class, bad overlap, or a device that is not there.
        """
        return segment_volume(self, ct, classes=classes, **options)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> Self:
        """Load a model.

        Args:
            name_or_path: As of `foundation.from_pretrained`.
            **options: As of `foundation.from_pretrained`.

        Raises:
            UsageError: It is of another kind than this class.
        """
        from foundation.hub.load import from_pretrained

        model: nn.Module = from_pretrained(name_or_path, **options)
        if not isinstance(model, cls):
            raise UsageError(
                f"{str(name_or_path)!r} is a {type(model).__name__}, not a {cls.__name__}. Load it "
                "by foundation.from_pretrained."
            )
        return model

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write a folder that `from_pretrained` loads; see `foundation.save_pretrained`."""
        from foundation.hub.saved import save_pretrained

        return save_pretrained(self, folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model and return the address of the commit; see `foundation.push_to_hub`."""
        from foundation.hub.upload import push_to_hub

        return push_to_hub(self, repo_id, **options)


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
                parts.append(self.head.read(sampled[..., None, None], generated, None).flatten(2))
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


class PlainModel(Model):
    """A backbone with a head without text: one channel a class, as in the published transfer.

    Args:
        config: Architecture, classes, activation and preprocessing.

    Raises:
        UsageError: The backbone cannot be built.
    """

    head: PlainHead

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        count = len(config.classes)
        self.head = PlainHead(self.backbone.full_channels, count, config.activation)

    def forward(self, image: Tensor, channels: Sequence[int] | None = None) -> Tensor:
        """Compute the logits of the classes.

        Args:
            image: (B, C, X, Y, Z), preprocessed.
            channels: Which classes, as indices; a softmax always gives all.

        Returns:
            (B, k, X, Y, Z) for a sigmoid; (B, 1 + K, X, Y, Z) for a softmax, background first.

        Raises:
            UsageError: The image does not fit, see `features`.
        """
        logits: Tensor = self.head(self.backbone.decode(self.features(image)), channels)
        return logits

    def logits_at(self, image: Tensor, voxels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the logits at some voxels only, for a loss on a sample of them.

        Args:
            image: (B, C, X, Y, Z), preprocessed.
            voxels: Flat indices (B, M); with one for each voxel, they must be in order.

        Returns:
            Logits (B, K, M), or (B, 1 + K, M) for a softmax, and the features (B, C, M) there.

        Raises:
            UsageError: The image does not fit, see `features`.
        """
        sampled = self.backbone.decode(self.features(image)).flatten(2)
        if voxels.shape[1] != sampled.shape[2]:
            sampled = sampled.gather(2, voxels[:, None].expand(-1, sampled.shape[1], -1))
        return self.head.logits_at(sampled), sampled


def build_model(
    config: NetworkConfig, state: Mapping[str, Tensor], prompt_embedding: Tensor | None, source: str
) -> Model:
    """Build the model of `config` with exactly the given weights, in evaluation mode.

    Args:
        config: A `ModelConfig` for a text-driven model; without text it has a plain head.
        state: Its weights, with or without the prompts.
        prompt_embedding: (K, D), for a text-driven model.
        source: Name of the weights in errors.

    Raises:
        WeightsError: The configuration builds no model; or keys are missing or unexpected, or
            shapes differ; it lists them.
    """
    model: Model
    try:
        if isinstance(config, ModelConfig):
            model = UniversalModel(config, prompt_embedding)
            state = {**state, PROMPTS: model.prompt_embedding}
        else:
            model = PlainModel(config)
    except UsageError as error:
        raise WeightsError(f"The configuration of {source} builds no model: {error}") from error
    check_state(shapes_of(model), state, source)
    model.load_state_dict(state)
    return model.eval()


def weights_of(model: Model) -> dict[str, Tensor]:
    """Return the state dict of a model without its prompts."""
    return {name: value for name, value in model.state_dict().items() if name != PROMPTS}


def check_state(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], source: str
) -> None:
    """Compare the keys and shapes of weights with those of a network.

    Args:
        expected: Shape of each key.
        given: The weights.
        source: Name of the weights in the error.

    Raises:
        WeightsError: They differ; the message lists what is missing, unexpected or mis-shaped.
    """
    shapes = [
        f"{name} is {tuple(given[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "of another shape": shapes,
    }
    parts = [f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in problems.items() if keys]
    if parts:
        raise WeightsError(
            f"The weights of {source} do not fit the architecture; {'; '.join(parts)}. "
            "Nothing was loaded."
        )


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each key of a network's state dict."""
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
