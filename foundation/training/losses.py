"""Losses over partially labelled scans: what a scan's source does not annotate gets no gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from foundation.errors import UsageError
from foundation.taxonomy import CLASSES

# Classes of which a voxel has at most one: not lesions, nor vessels inside the liver.
EXCLUSIVE = torch.tensor([c.kind == "organ" and c.name != "hepatic_vessel" for c in CLASSES])
BINARY_WEIGHT = 0.2  # it keeps each sigmoid honest; more of it holds every class down at first


def masked_loss(
    logits: Tensor,
    target: Tensor,
    annotated: Tensor,
    weight: Tensor,
    balance: float = 0.0,
    exclusive: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return loss terms of a batch, each a mean over its scans; their sum is to be minimised.

    As `scan_losses`, with the weights of the embedded model's training.
    """
    terms = scan_losses(logits, target, annotated, weight, balance=balance, exclusive=exclusive)
    terms["binary"] = BINARY_WEIGHT * terms["binary"]
    return {name: values.sum() / len(logits) for name, values in terms.items()}


def scan_losses(
    logits: Tensor,
    target: Tensor,
    annotated: Tensor,
    weight: Tensor,
    *,
    balance: float = 0.0,
    exclusive: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return our loss terms of each scan, (B,) each; 0 for a scan that labels nothing.

    `dice` and `binary` are the published pair. Dice here is of each scan and class, and only of
    classes that are present: the empty ones are the binary term's, which has a small weight.
    `exclusive` is ours: a softmax over the annotated exclusive classes, with background at logit
    0. Where one class is alone it decides as the sigmoid does; it lifts off far earlier in
    training, and needs no second head.

    Args:
        logits: (B, K, M) of M voxels of each scan, or (B, K, X, Y, Z).
        target: Whether a voxel belongs to a class, bool, of the shape of the logits.
        annotated: Whether the dataset of a scan labels a class, bool (B, K).
        weight: Of each voxel, in [0, 1], (B, M) or (B, X, Y, Z).
        balance: In `exclusive` a voxel counts by (size of its class)^-balance, 0 for all alike; in
            `binary` the voxels of a class that is not exclusive, of a lesion say, count by (its
            voxels against all others')^-balance.
        exclusive: Classes of which a voxel has at most one, bool (K,). If not given, the organs
            where K is the taxonomy's 32, and none otherwise.

    Raises:
        UsageError: The shapes do not fit each other, or `annotated` or `exclusive` is not bool.
    """
    logits, target, weight = _checked(logits, target, annotated, weight)
    if exclusive is None:
        exclusive = EXCLUSIVE
        if len(exclusive) != logits.shape[1]:
            exclusive = torch.zeros(logits.shape[1], dtype=torch.bool)
    elif exclusive.dtype != torch.bool or tuple(exclusive.shape) != (logits.shape[1],):
        raise UsageError(
            f"exclusive is {_shape(exclusive)}; give a bool for each of the {logits.shape[1]} "
            "classes."
        )
    found: dict[str, list[Tensor]] = {"dice": [], "binary": [], "exclusive": []}
    for scan, known in enumerate(annotated):
        if not known.any() or weight[scan].sum() == 0:
            _append_zeros(found, logits[scan])
            continue
        alone = exclusive.to(known.device)[known]
        z, t, w = logits[scan][known], target[scan][known], weight[scan]
        found["dice"].append(_dice(_probabilities(z, alone), t, w))
        found["binary"].append(_binary(z, t, w, _raised(t, w, alone, balance)))
        found["exclusive"].append(_exclusive(z[alone], t[alone], w, balance))
    return {name: torch.stack(values) for name, values in found.items()}


def published_losses(
    logits: Tensor, target: Tensor, annotated: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Return the paper's masked BCE and Dice of each scan, (B,) each.

    Both are means over the scan's annotated classes; a batch is then the mean of its scans. The
    published code takes one mean over all pairs of scan and class in a process, so that there a
    scan with many labels counts more, and what it counts depends on its neighbours in the batch.
    Dice is of each volume and class, smoothed above and below the line, and of present classes
    only: the published one, smoothed below alone, is a constant 1 for an absent class, and until
    May 2024 was computed for each slice. Arguments and errors are those of `scan_losses`.
    """
    logits, target, weight = _checked(logits, target, annotated, weight)
    found: dict[str, list[Tensor]] = {"dice": [], "binary": []}
    for scan, known in enumerate(annotated):
        if not known.any() or weight[scan].sum() == 0:
            _append_zeros(found, logits[scan])
            continue
        z, t, w = logits[scan][known], target[scan][known], weight[scan]
        found["dice"].append(_dice(z.sigmoid(), t, w))
        found["binary"].append(_binary(z, t, w) / len(z))
    return {name: torch.stack(values) for name, values in found.items()}


def _checked(
    logits: Tensor, target: Tensor, annotated: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and target (B, K, M), weight (B, M), once their shapes are known to be right."""
    batch, classes, *voxels = logits.shape
    if not voxels or target.shape != logits.shape or tuple(weight.shape) != (batch, *voxels):
        raise UsageError(
            f"Shapes do not fit: logits {tuple(logits.shape)}, target {tuple(target.shape)}, "
            f"weight {tuple(weight.shape)}. Give logits and target (B, K, M) with weight (B, M), "
            "or (B, K, X, Y, Z) with (B, X, Y, Z)."
        )
    if annotated.dtype != torch.bool or tuple(annotated.shape) != (batch, classes):
        raise UsageError(
            f"annotated is {_shape(annotated)}; give bool ({batch}, {classes}): whether the "
            "dataset of each scan labels each class."
        )
    return logits.flatten(2), target.flatten(2), weight.flatten(1)


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _append_zeros(found: dict[str, list[Tensor]], logits: Tensor) -> None:
    """A loss of 0 that still depends on the logits: every parameter gets a gradient, of 0."""
    for values in found.values():
        values.append(logits.sum() * 0.0)


def _probabilities(logits: Tensor, exclusive: Tensor) -> Tensor:
    """Softmax over the exclusive classes with background at logit 0; sigmoid for the others."""
    shares = _with_background(logits[exclusive]).softmax(0)[1:]
    return logits.sigmoid().index_put((exclusive.nonzero()[:, 0],), shares)


def _with_background(logits: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(logits[:1]), logits])


def _dice(probabilities: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """1 - Dice, smoothed by one voxel, averaged over the classes that are present."""
    truth = target * weight
    overlap = (probabilities * truth).sum(1)  # each voxel counts by its weight, once
    total = (probabilities * weight).sum(1) + truth.sum(1)
    present = truth.sum(1) > 0
    if not present.any():
        return probabilities.sum() * 0.0
    return (1 - (2 * overlap + 1) / (total + 1))[present].mean()


def _raised(target: Tensor, weight: Tensor, exclusive: Tensor, balance: float) -> Tensor | None:
    """What a voxel of each class counts in `_binary`, (K, 1); None where all count 1.

    Nothing else lifts small classes off that no softmax knows: lesions stayed at 0 without it.
    """
    if not balance:
        return None
    voxels = (target * weight).sum(1)
    share = (weight.sum() - voxels) / voxels.clamp_min(1)
    return torch.where(exclusive, 1.0, share.clamp_min(1).pow(balance))[:, None]


def _binary(logits: Tensor, target: Tensor, weight: Tensor, raised: Tensor | None = None) -> Tensor:
    """Summed over classes, averaged over voxels: on the scale of the softmax's cross-entropy."""
    losses = functional.binary_cross_entropy_with_logits(
        logits, target.to(logits.dtype), reduction="none", pos_weight=raised
    )
    return (losses.sum(0) * weight).sum() / weight.sum()


def _exclusive(logits: Tensor, target: Tensor, weight: Tensor, balance: float) -> Tensor:
    """Cross-entropy over background and exclusive classes, a weighted average over voxels."""
    if not len(logits):
        return logits.sum() * 0.0
    truth = torch.where(target.any(0), target.to(torch.uint8).argmax(0) + 1, 0)
    losses = functional.cross_entropy(_with_background(logits).T, truth, reduction="none")
    if balance:
        sizes = weight.new_zeros(len(logits) + 1).index_add_(0, truth, weight).clamp_min(1)
        weight = weight * sizes[truth].pow(-balance)
    return (losses * weight).sum() / weight.sum()
