"""The text-driven head: prompt embedding and image feature in, one segmentation per class out.

Reference: CLIP-Driven Universal Model (arXiv 2301.00785), section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

IMAGE_DIM = 256  # width of the global image feature and of the projected prompt
HIDDEN = 8  # width of the three generated convolutions
GENERATED = 2 * HIDDEN * HIDDEN + HIDDEN + 2 * HIDDEN + 1  # 153 parameters a class
GROUPS = 16  # of the normalisations; fewer where a width is no multiple of it
CHUNK_VOXELS = 4096  # fits the inner caches: larger chunks measured up to 2.5 times slower


class TextDrivenHead(nn.Module):
    """Generates three 1×1×1 convolutions (8→8→8→1) per class and applies them to the features.

    Args:
        deep_channels: Channels of the bottleneck feature.
        full_channels: Channels of the full-resolution feature.
        text_dim: Length of a prompt embedding.
        standardise_text: Centre and scale the prompts before the first layer, by the buffers
            `text_shift` (D) and `text_scale` (): in most encoders' spaces, prompts of one template
            lie close together.
    """

    text_shift: Tensor
    text_scale: Tensor

    def __init__(
        self, deep_channels: int, full_channels: int, text_dim: int, standardise_text: bool = False
    ) -> None:
        super().__init__()
        self.feature_projection = nn.Sequential(
            nn.GroupNorm(math.gcd(GROUPS, full_channels), full_channels),
            nn.ReLU(),
            nn.Conv3d(full_channels, HIDDEN, 1),
        )
        self.global_feature = nn.Sequential(
            nn.GroupNorm(math.gcd(GROUPS, deep_channels), deep_channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Conv3d(deep_channels, IMAGE_DIM, 1),
        )
        self.text_projection = nn.Linear(text_dim, IMAGE_DIM)
        self.controller = nn.Linear(2 * IMAGE_DIM, GENERATED)
        self.standardise_text = standardise_text
        if standardise_text:
            self.register_buffer("text_shift", torch.zeros(text_dim))
            self.register_buffer("text_scale", torch.ones(()))
        self._spread_generated_weights()

    def _spread_generated_weights(self) -> None:
        """Start with generated layers that pass a signal on, and differ by class.

        With a linear layer's usual start the generated weights are some ten times too small for
        three layers in a row, and training stands still for long. Here they have about the
        standard deviation that suits 8 inputs and a ReLU, mostly from the text, and every class
        starts absent. Reference: principled initialisation of hypernetworks, Chang et al., ICLR
        2020; the factors are ours.
        """
        biases = slice(2 * HIDDEN * HIDDEN + HIDDEN, None)
        with torch.no_grad():
            from_text = self.controller.weight[:, IMAGE_DIM:]
            from_text[: biases.start] *= 3.0
            self.controller.weight[biases] *= 0.3
            self.controller.bias.zero_()
            self.controller.bias[-1] = -2.0

    def generate(self, deep: Tensor, prompt_embedding: Tensor) -> Tensor:
        """Generate the parameters of every class's convolutions.

        Args:
            deep: Bottleneck feature (B, C, x, y, z).
            prompt_embedding: (K, D).

        Returns:
            (B, K, 153).
        """
        if self.standardise_text:
            prompt_embedding = (prompt_embedding - self.text_shift) * self.text_scale
        text = torch.relu(self.text_projection(prompt_embedding))
        image = self.global_feature(deep).flatten(1)
        batch, classes = image.shape[0], text.shape[0]
        # Image first, text second: the order of the published weights.
        pair = torch.cat(
            [image[:, None].expand(-1, classes, -1), text[None].expand(batch, -1, -1)], dim=2
        )
        generated: Tensor = self.controller(pair)
        return generated

    def normalise(self, full: Tensor) -> Tensor:
        """Normalise features (B, C, X, Y, Z) as the classifiers read them."""
        # Group normalisation of channels-last memory is ten times as slow on a CPU.
        normalised: Tensor = self.feature_projection[:2](full.contiguous())
        return normalised

    def sample(self, full: Tensor, voxels: Tensor) -> Tensor:
        """Return normalised features (B, C, M) at flat voxel indices (B, M)."""
        normalised = self.normalise(full).flatten(2)
        return normalised.gather(2, voxels[:, None].expand(-1, normalised.shape[1], -1))

    def forward(
        self, full: Tensor, generated: Tensor, chunk_voxels: int | None = CHUNK_VOXELS
    ) -> Tensor:
        """Compute the logits.

        Args:
            full: Full-resolution feature (B, C, X, Y, Z).
            generated: What `generate` returned, (B, K, 153).
            chunk_voxels: See `read`.

        Returns:
            (B, K, X, Y, Z).
        """
        return self.read(self.normalise(full), generated, chunk_voxels)

    def read(
        self, normalised: Tensor, generated: Tensor, chunk_voxels: int | None = CHUNK_VOXELS
    ) -> Tensor:
        """Compute the logits from normalised features.

        Args:
            normalised: (B, C, X, Y, Z).
            generated: What `generate` returned, (B, K, 153).
            chunk_voxels: Voxels at a time while no gradients are kept, so that the memory beside
                the logits does not grow with the volume; None, all at once.

        Returns:
            (B, K, X, Y, Z).
        """
        projected = self.feature_projection[2](normalised).flatten(2)  # (B, 8, N)
        batch, _, voxels = projected.shape
        classes = generated.shape[1]
        if torch.is_grad_enabled() or chunk_voxels is None or is_recorded():
            logits = _apply(projected, generated)
        else:
            logits = projected.new_empty((batch, classes, voxels))  # MetaTensor wants a tuple
            for start in range(0, voxels, chunk_voxels):
                part = slice(start, start + chunk_voxels)
                logits[..., part] = _apply(projected[..., part], generated)
        return logits.view(batch, classes, *normalised.shape[2:])


def as_volume(sampled: Tensor) -> Tensor:
    """Return features (B, C, M) of some voxels as a volume (B, C, 1, 1, M) of a single row.

    Along the first axis in place of the last, the gradient of a 1×1×1 convolution would take fifty
    times as long on one CPU core.
    """
    return sampled[:, :, None, None]


def is_recorded() -> bool:
    """Whether a computation is being traced or exported: it must not depend on sizes or values."""
    compiler = torch.compiler
    is_exported = getattr(compiler, "is_exporting", compiler.is_compiling)  # torch before 2.7
    return bool(torch.jit.is_tracing() or is_exported())  # type: ignore[attr-defined, no-untyped-call]


def _apply(projected: Tensor, generated: Tensor) -> Tensor:
    """projected (B, 8, N), generated (B, K, 153) → logits (B, K, N); no feature is repeated."""
    batch, classes, _ = generated.shape
    square = HIDDEN * HIDDEN
    w1, w2, w3, b1, b2, b3 = generated.split([square, square, HIDDEN, HIDDEN, HIDDEN, 1], dim=2)
    flat = batch * classes
    # The first layer reads the same features for every class: one matrix of K·8 rows.
    hidden = torch.baddbmm(
        b1.reshape(batch, classes * HIDDEN, 1),
        w1.reshape(batch, classes * HIDDEN, HIDDEN),
        projected,
    ).relu_()
    hidden = hidden.view(flat, HIDDEN, -1)
    hidden = torch.baddbmm(
        b2.reshape(flat, HIDDEN, 1), w2.reshape(flat, HIDDEN, HIDDEN), hidden
    ).relu_()
    logits = torch.baddbmm(b3.reshape(flat, 1, 1), w3.reshape(flat, 1, HIDDEN), hidden)
    return logits.view(batch, classes, -1)
