"""Losses over partially labelled scans: what a scan's source does not annotate gets no gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from foundation.taxonomy import CLASSES

# Classes of which a voxel has at most one: not lesions, nor vessels inside the liver.
EXCLUSIVE = torch.tensor([c.kind == "organ" and c.name != "hepatic_vessel" for c in CLASSES])


def masked_loss(
    logits: Tensor, target: Tensor, annotated: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Loss terms of a batch; their sum is to be minimised.

    logits (B, K, M); target (B, K, M) bool; annotated (B, K) bool; weight (B, M) in [0, 1].

    `dice` and `binary` are the published pair (Dice here is per scan and class, and only of
    classes that are present: the empty ones are the binary term's). `exclusive` is ours: a
    softmax over the annotated exclusive classes and background at logit 0. It has the sigmoid's
    decision where one class is alone, lifts off far earlier in training, and needs no second head.
    """
    parts: dict[str, list[Tensor]] = {"dice": [], "binary": [], "exclusive": []}
    for scan in range(len(logits)):
        known = annotated[scan]
        z, t, w = logits[scan][known], target[scan][known], weight[scan]
        if not known.any() or w.sum() == 0:
            continue
        parts["dice"].append(_dice(z, t, w))
        parts["binary"].append(_binary(z, t, w))
        parts["exclusive"].append(_exclusive(z, t, w, EXCLUSIVE.to(known.device)[known]))
    zero = logits.sum() * 0.0
    return {
        name: torch.stack(values).sum() / len(logits) if values else zero
        for name, values in parts.items()
    }


def _dice(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    probabilities = logits.sigmoid() * weight
    truth = target * weight
    overlap = (probabilities * truth).sum(1)
    total = probabilities.sum(1) + truth.sum(1)
    present = truth.sum(1) > 0
    if not present.any():
        return logits.sum() * 0.0
    return (1 - (2 * overlap + 1) / (total + 1))[present].mean()


def _binary(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Summed over classes, averaged over voxels: on the scale of the softmax's cross-entropy."""
    losses = functional.binary_cross_entropy_with_logits(
        logits, target.to(logits.dtype), reduction="none"
    )
    return (losses.sum(0) * weight).sum() / weight.sum()


def _exclusive(logits: Tensor, target: Tensor, weight: Tensor, exclusive: Tensor) -> Tensor:
    if not exclusive.any():
        return logits.sum() * 0.0
    z, t = logits[exclusive], target[exclusive]
    stacked = torch.cat([torch.zeros_like(z[:1]), z])
    truth = torch.where(t.any(0), t.to(torch.uint8).argmax(0) + 1, 0)
    losses = functional.cross_entropy(stacked.T, truth, reduction="none")
    return (losses * weight).sum() / weight.sum()
