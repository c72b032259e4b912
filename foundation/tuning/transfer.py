"""Transfer to a task: all of a network is trained on all of its classes, as published."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from foundation.config import Activation, Preprocessing
from foundation.model import Model, PlainModel
from foundation.networks.protocol import check_trainable
from foundation.training.losses import published_losses, scan_losses
from foundation.training.trainer import Trainer, accelerator_for
from foundation.tuning.data import TuningData
from foundation.tuning.feeds import PatchFeed, runs_in_bfloat16
from foundation.tuning.methods.base import TuningSettings
from foundation.tuning.objective import Forward, tuning_losses
from foundation.tuning.samples import FewScans
from foundation.tuning.task import TuningTask, identity
from foundation.tuning.tasks import PUBLISHED

_FEWEST_STEPS = 10  # between validations, where there are so many
_TEXT_BALANCE = 0.3  # of the text-driven head, as in every other method


@dataclass(frozen=True, kw_only=True)
class TransferSettings(TuningSettings):
    """Settings of a transfer.

    Args:
        head: text, softmax or sigmoid.
    """

    name: ClassVar[str] = "transfer"

    head: str


def transfer_method(
    head: str,
    preprocessing: Preprocessing,
    steps: int,
    *,
    batch_size: int = 1,
    learning_rate: float = PUBLISHED.learning_rate,
    voxels: int | None = None,
) -> TransferSettings:
    """Plan the published training at any length: a tenth warms up, 20 validations.

    All weights learn at one rate; nothing stops early. Deviations: the cosine ends at a twentieth
    of the rate, gradients are clipped, and `FewScans` places four of five patches on a class, every
    class alike, where the published crops are on a voxel of any class two times of three.

    Args:
        head: text, softmax or sigmoid.
        preprocessing: Tells the size of a patch.
        steps: Optimiser steps.
        batch_size: Patches in a batch.
        learning_rate: Of all weights.
        voxels: Of a patch, that the loss looks at; all if not given.

    Raises:
        UsageError: A number that is not above 0.
    """
    every = steps * PUBLISHED.validate_every // PUBLISHED.epochs
    return TransferSettings(
        head=head,
        steps=steps,
        batch_size=batch_size,
        validate_every=max(every, min(steps, _FEWEST_STEPS)),
        patience=max(1, steps) + 1,  # more validations than there are
        learning_rate=learning_rate,
        weight_decay=PUBLISHED.weight_decay,
        warm_up=max(1, steps * PUBLISHED.warm_up_epochs // PUBLISHED.epochs),
        balance=_TEXT_BALANCE if head == "text" else 0.0,
        voxels=prod(preprocessing.patch_size) if voxels is None else voxels,
    )


def plain_losses(given: Forward, balance: float, *, activation: Activation) -> dict[str, Tensor]:
    """Compute the loss of a head without text; the sum of its terms is to be minimised.

    With a softmax: Dice of the classes' probabilities, and cross-entropy over background and
    classes (`exclusive`). With sigmoids: Dice and binary cross-entropy. A class that a scan does
    not label is left out of both, and of the softmax too, as if it did not exist. Deviation from
    the published loss: Dice is of the classes alone that the patch shows; there, background counts
    as one of them, and an absent class is a constant.

    Args:
        given: What the model gave for some scans, and what they label.
        balance: See `scan_losses`.
        activation: Of the head.

    Returns:
        Terms of each scan by name, (B,) each.
    """
    if activation == "sigmoid":
        terms = published_losses(given.logits, given.target, given.annotated, given.weight)
    else:
        scores = given.logits.float()
        every = torch.ones(scores.shape[1] - 1, dtype=torch.bool, device=scores.device)
        terms = scan_losses(
            scores[:, 1:] - scores[:, :1],  # relative to background
            given.target,
            given.annotated,
            given.weight,
            balance=balance,
            exclusive=every,
        )
        del terms["binary"]
    return terms


def build_transfer(
    network: Model,
    data: TuningData,
    settings: TransferSettings,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    progress: bool = True,
) -> Trainer:
    """Prepare the training of all of a network on all of its classes.

    A class that no training scan shows is allowed: where a scan labels it, it is absent.

    Args:
        network: Is trained in place.
        data: The scans.
        settings: See `transfer_method`.
        folder: Receives the state and the logs; see `Trainer`.
        seed: Of the patches.
        device: Where to compute.
        progress: Show how far it is.

    Raises:
        UsageError: The network reads scans in a way that training cannot, or `folder` holds another
            tuning.
    """
    pre = network.config.preprocessing
    check_trainable(network.config)
    classes = network.config.class_names
    network.to(device).requires_grad_(True)
    known = identity(network, data, classes, settings, seed)
    # As JSON gives it back: lists for tuples.
    known["preprocessing"] = json.loads(json.dumps(asdict(pre)))
    terms: tuple[str, ...] = ("dice", "binary", "exclusive")
    losses: Callable[[Forward, float], dict[str, Tensor]]
    if isinstance(network, PlainModel):
        losses = partial(plain_losses, activation=network.config.activation)
        terms = ("dice", "binary" if network.config.activation == "sigmoid" else "exclusive")
    else:
        exclusive = torch.ones(len(classes), dtype=torch.bool, device=device)
        losses = partial(tuning_losses, exclusive=exclusive, distil=0.0)
    fast = runs_in_bfloat16(network, pre.patch_size, device)
    task = TuningTask(
        model=network,
        settings=settings,
        feed=PatchFeed(
            settings, network, FewScans(data.train, classes), data.validation, seed=seed
        ),
        rates={name: settings.learning_rate for name, _ in network.named_parameters()},
        objective=losses,
        terms=terms,
        classes=classes,
        identity=known,
    )
    accelerator = accelerator_for("bfloat16" if fast else "float32", device)
    return task.trainer(accelerator, folder, seed=seed, progress=progress)
