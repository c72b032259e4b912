"""What a tuning step minimises: masked losses of what is labelled, and the old model's opinion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from foundation.training.losses import BINARY_WEIGHT, scan_losses


@dataclass(frozen=True)
class Forward:
    """The logits of a batch, and what they should be, for K classes at M voxels.

    Attributes:
        logits: (B, K, M).
        target: bool (B, K, M), whether a voxel belongs to a class.
        annotated: bool (B, K), whether a scan labels a class.
        weight: (B, M), how much each voxel counts, 0 or more.
        taught: (B, k, M), logits of the old model for the first k classes; None without it.
    """

    logits: Tensor
    target: Tensor
    annotated: Tensor
    weight: Tensor
    taught: Tensor | None = None


def tuning_losses(
    given: Forward, balance: float, *, exclusive: Tensor, distil: float
) -> dict[str, Tensor]:
    """Return the terms of each scan's loss, (B,) each; the mean of their sum is to be minimised.

    Args:
        given: What the network gave.
        balance: See `scan_losses`.
        exclusive: Classes of which a voxel has at most one, bool (K,).
        distil: Weight of the cross-entropy against the old model's probabilities, for the old
            classes that a scan does not label: there only its opinion is known.
    """
    terms = scan_losses(
        given.logits,
        given.target,
        given.annotated,
        given.weight,
        balance=balance,
        exclusive=exclusive,
    )
    terms["binary"] = BINARY_WEIGHT * terms["binary"]
    if given.taught is not None and distil:
        terms["distil"] = distil * distillation(given)
    return terms


def distillation(given: Forward) -> Tensor:
    """Return the old classes' cross-entropy against the old model's, less its least value, (B,).

    Summed over classes and averaged over voxels, as `binary` is; 0 where both models agree.
    """
    taught = given.taught
    assert taught is not None
    old = taught.shape[1]
    said, probability = given.logits[:, :old], taught.sigmoid()
    losses = functional.binary_cross_entropy_with_logits(said, probability, reduction="none")
    least = functional.binary_cross_entropy_with_logits(taught, probability, reduction="none")
    asked = ~given.annotated[:, :old, None] & torch.ones_like(losses, dtype=torch.bool)
    weight = given.weight[:, None] * asked
    return ((losses - least) * weight).sum((1, 2)) / given.weight.sum(1).clamp_min(1)
