"""Transfer to a task: all of a network is trained on all of its classes, as published."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from foundation.config import Activation, Preprocessing
from foundation.errors import UsageError
from foundation.model import Model
from foundation.networks.encoder import check_patch
from foundation.training.losses import published_losses, scan_losses
from foundation.training.trainer import Trainer
from foundation.tuning.data import TuningData
from foundation.tuning.feeds import Feed, PatchFeed
from foundation.tuning.methods import Method
from foundation.tuning.objective import Forward
from foundation.tuning.run import TuningRun, TuningTask
from foundation.tuning.tasks import PUBLISHED

_TEXT_BALANCE = 0.3  # of the text-driven head, as in every other method


@dataclass(frozen=True, kw_only=True)
class Transfer(Method):
    """All weights are trained at one rate; nothing stops early.

    Deviations from the published training: the cosine ends at a twentieth of the rate, gradients
    are clipped, and `FewScans` places four of five patches on a class, every class alike, where the
    published crops are on a voxel of any class two times of three.

    Args:
        head: softmax, sigmoid or text.
    """

    name: ClassVar[str] = "transfer"
    summary: ClassVar[str] = "all of a network is trained on all of its classes"

    head: str = "softmax"

    def rates(self, model: Model) -> dict[str, float]:
        """As `Method.rates`: everything, at one rate."""
        return {name: self.learning_rate for name, _ in model.named_parameters()}

    def feed(self, run: TuningRun) -> Feed:
        """As `Method.feed`: patches."""
        return PatchFeed(run, self, pseudo={})


def transfer_method(
    head: str,
    preprocessing: Preprocessing,
    steps: int,
    *,
    batch_size: int = 1,
    learning_rate: float = PUBLISHED.learning_rate,
    voxels: int | None = None,
) -> Transfer:
    """Plan the published training at any length: a tenth warms up, 20 validations.

    Args:
        head: softmax, sigmoid or text.
        preprocessing: Tells the size of a patch.
        steps: Optimiser steps.
        batch_size: Patches in a batch.
        learning_rate: Of all weights.
        voxels: Of a patch, that the loss looks at; all if not given.

    Raises:
        UsageError: A number that is not above 0.
    """
    return Transfer(
        head=head,
        steps=steps,
        batch_size=batch_size,
        validate_every=max(1, steps * PUBLISHED.validate_every // PUBLISHED.epochs),
        patience=max(1, steps) + 1,  # more validations than there are
        learning_rate=learning_rate,
        weight_decay=PUBLISHED.weight_decay,
        warm_up=max(1, steps * PUBLISHED.warm_up_epochs // PUBLISHED.epochs),
        balance=_TEXT_BALANCE if head == "text" else 0.0,
        voxels=prod(preprocessing.patch_size) if voxels is None else voxels,
    )


def plain_losses(given: Forward, balance: float, *, activation: Activation) -> dict[str, Tensor]:
    """Compute the loss of a head without text; the mean of its terms' sum is to be minimised.

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
        Terms by name, (B,) each.
    """
    if activation == "sigmoid":
        return published_losses(given.logits, given.target, given.annotated, given.weight)
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


class TransferRun(TuningRun):
    """A tuning of all of a network, on all of its classes."""

    @property
    def learnt(self) -> tuple[str, ...]:
        """All classes: those that no training scan shows, too, are learnt to be absent."""
        return self.model.classes

    @property
    def added(self) -> tuple[str, ...]:
        """All classes, as none was known."""
        return self.model.classes

    @property
    def old(self) -> tuple[str, ...]:
        """None."""
        return ()

    def task(self, method: Method) -> TuningTask:
        """As `TuningRun.task`, with the loss of the network's head."""
        task = super().task(method)
        config = self.model.config
        assert isinstance(method, Transfer)
        if method.head != "text":
            task.terms = ("dice", "exclusive" if config.activation == "softmax" else "binary")
            task.objective = partial(plain_losses, activation=config.activation)
        pre = json.loads(
            json.dumps(asdict(config.preprocessing))
        )  # lists for tuples, as it is read
        task.identity["preprocessing"] = pre
        return task


def transfer_trainer(
    network: Model,
    data: TuningData,
    method: Transfer,
    folder: Path,
    *,
    seed: int,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> Trainer:
    """Prepare the training of all of a network on all of its classes.

    Args:
        network: Is trained in place.
        data: The scans.
        method: See `transfer_method`.
        folder: Receives the state and the logs; see `Trainer`.
        seed: Of the patches.
        device: Where to compute.
        progress: Show how far it is.

    Raises:
        UsageError: The patch does not fit the backbone; the network reads scans as training cannot;
            or `folder` holds another tuning.
    """
    pre = network.config.preprocessing
    check_patch(pre.patch_size, network.backbone, network.config.backbone)
    check_readable(pre)
    # The run asks for what both kinds of model have: config, classes, `logits_at`.
    model: Any = network
    run = TransferRun(model, method, folder, seed=seed, device=device, progress=progress)
    run.data, run.model = data, model
    return run.trainer(method, folder)


def check_readable(pre: Preprocessing) -> None:
    """Refuse what inference can read and the reading of training scans cannot.

    Raises:
        UsageError: Another orientation than RAS, another spacing along another axis, or HU that
            are not scaled to [0, 1].
    """
    if pre.orientation != "RAS" or len(set(pre.spacing_mm)) > 1 or pre.hu_mean_std:
        raise UsageError(
            f"Training reads scans in RAS, at one spacing, with HU windows scaled to [0, 1]; here "
            f"are {pre.orientation}, {pre.spacing_mm} mm, hu_mean_std {pre.hu_mean_std}."
        )
