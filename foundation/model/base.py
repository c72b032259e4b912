"""What all models share: a backbone on which a subclass puts a head, and the methods for users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foundation.config import NetworkConfig, Origin
from foundation.errors import UsageError, listed
from foundation.imaging.expected_dice import Calibration
from foundation.imaging.result import Segmentation
from foundation.imaging.volumes import Source
from foundation.inference.predict import segment_volume
from foundation.networks.backbones import build_backbone
from foundation.networks.encoder import Encoder, check_image
from foundation.networks.head import is_recorded

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from foundation.inference.options import InferenceOptions


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
        self.calibration: Calibration | None = None  # of the weights as they were loaded
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
