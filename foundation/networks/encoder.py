"""The encoder of a model alone, for transfer: a CT patch in, its feature pyramid out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from foundation.config import NetworkConfig, Preprocessing
from foundation.errors import UsageError
from foundation.imaging.preprocess import preprocess
from foundation.imaging.volumes import Source
from foundation.networks.backbones import Backbone


class Encoder(nn.Module):
    """The encoding half of a backbone. It shares its weights with the model it came from.

    It has no parameter of the decoder, so that each of its parameters gets a gradient.

    Attributes:
        config: Of the model: name, licence, preprocessing.

    Args:
        backbone: Whose encoder it is.
        config: Of the model.
    """

    def __init__(self, backbone: Backbone, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone.without_decoder()

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.config.name

    @property
    def licence(self) -> str:
        """SPDX id of the licence of the weights, or the name under which it is known."""
        return self.config.licence

    @property
    def preprocessing(self) -> Preprocessing:
        """How a CT becomes the input; see `preprocess`."""
        return self.config.preprocessing

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level of the pyramid, finest first."""
        return self.backbone.channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each level, in voxels of the image."""
        return self.backbone.strides

    @property
    def divisor(self) -> int:
        """Every spatial size of the image must be a multiple of this."""
        return self.backbone.divisor

    def forward(self, image: Tensor) -> list[Tensor]:
        """Compute the feature pyramid.

        Args:
            image: (B, C, X, Y, Z), preprocessed.

        Returns:
            One tensor a level, finest first: (B, channels[i], X / strides[i], …).

        Raises:
            UsageError: The image has another number of axes or channels than the network reads, or
                a size that it cannot take.
        """
        check_image(image, self.backbone, self.config)
        return self.backbone.encode(image)

    def preprocess(self, ct: Source) -> Tensor:
        """Read a CT as the input of this encoder: oriented, resampled, normalised.

        Args:
            ct: Path of a NIfTI file, nibabel image, or (array in HU, affine).

        Returns:
            (C, X, Y, Z) float32; cut a patch whose sizes are multiples of `divisor`.

        Raises:
            VolumeError: The CT cannot be read.
        """
        return preprocess(ct, self.preprocessing)

    def follow(self, backbone: Backbone, config: NetworkConfig) -> None:
        """Take over a changed configuration and exchanged layers of the model."""
        self.config = config
        self.training = backbone.training
        parts = [[each.get_submodule(part) for part in backbone.encoder_parts]
                 for each in (self.backbone, backbone)]  # fmt: skip
        if parts[0] != parts[1]:
            self.backbone = backbone.without_decoder()


def check_image(image: Tensor, backbone: Backbone, config: NetworkConfig) -> None:
    """Refuse an image that a backbone cannot take.

    Args:
        image: What was given as (B, C, X, Y, Z).
        backbone: What will compute its features.
        config: Tells the channels, and the name of the backbone.

    Raises:
        UsageError: Another number of axes or channels, or sizes that `check_patch` refuses.
    """
    shape, name, count = tuple(image.shape), config.backbone, config.preprocessing.channels
    if len(shape) != 5 or shape[1] != count:
        raise UsageError(
            f"The image has shape {shape}; {config.name!r} reads (B, {count}, X, Y, Z), a channel "
            f"for each of its HU windows: {config.preprocessing.hu_windows}."
        )
    check_patch(shape[2:], backbone, name)


def check_patch(sizes: Sequence[int], backbone: Backbone, name: str) -> None:
    """Refuse a patch that a backbone cannot take.

    Args:
        sizes: X, Y, Z in voxels.
        backbone: What is to compute its features.
        name: Its name, for the error.

    Raises:
        UsageError: A size is not a multiple of the divisor; or a single voxel would be left for
            instance normalisation.
    """
    sizes = tuple(sizes)
    if any(size % backbone.divisor for size in sizes):
        raise UsageError(
            f"The patch is {sizes} voxels; {name} needs multiples of {backbone.divisor}."
        )
    deepest = backbone.strides[-1]
    if backbone.has_instance_norm and all(size == deepest for size in sizes):
        raise UsageError(
            f"The patch is {sizes} voxels, which leaves {name} a single one at its deepest "
            f"level, too few for instance normalisation. Make one side {2 * deepest} or more."
        )
