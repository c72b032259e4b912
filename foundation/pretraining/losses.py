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
    """Loss terms of a batch, each a mean over its scans; their sum is to be minimised.

    logits (B, K, M) of M voxels of each scan; target (B, K, M) bool: what they belong to;
    annotated (B, K) bool: the dataset of this scan labels this class; weight (B, M) in [0, 1].

    `dice` and `binary` are the published pair. Dice here is of each scan and class, and only of
    classes that are present: the empty ones are the binary term's.
    `exclusive` is ours: a softmax over the annotated exclusive classes, with background at logit
    0. Where one class is alone it decides as the sigmoid does; it lifts off far earlier in
    training, and needs no second head.
    """
    terms: dict[str, list[Tensor]] = {"dice": [], "binary": [], "exclusive": []}
    for scan, known in enumerate(annotated):
        if not known.any() or weight[scan].sum() == 0:
            continue
        of_scan = logits[scan][known], target[scan][known], weight[scan]
        terms["dice"].append(_dice(*of_scan))
        terms["binary"].append(_binary(*of_scan))
        terms["exclusive"].append(_exclusive(*of_scan, EXCLUSIVE.to(known.device)[known]))
    zero = logits.sum() * 0.0
    return {
        name: torch.stack(values).sum() / len(logits) if values else zero
        for name, values in terms.items()
    }


def _dice(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """1 - Dice, smoothed by one voxel, averaged over the classes that are present."""
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
    """Cross-entropy of background and the classes marked `exclusive`, averaged over voxels."""
    if not exclusive.any():
        return logits.sum() * 0.0
    logits, target = logits[exclusive], target[exclusive]
    with_background = torch.cat([torch.zeros_like(logits[:1]), logits])
    truth = torch.where(target.any(0), target.to(torch.uint8).argmax(0) + 1, 0)
    losses = functional.cross_entropy(with_background.T, truth, reduction="none")
    return (losses * weight).sum() / weight.sum()
