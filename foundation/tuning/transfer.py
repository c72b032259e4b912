"""Transfer to a task: all of a network is trained on all of its classes, as published."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from foundation.config import Preprocessing
from foundation.errors import UsageError
from foundation.evaluation.validation import mean_dice, validate
from foundation.model import UniversalModel
from foundation.networks.plain_head import Activation, LinearNetwork
from foundation.training.losses import published_losses, scan_losses
from foundation.training.mixture import Mixture
from foundation.training.sample import PatchGrid
from foundation.tuning.data import TuningData
from foundation.tuning.feeds import PatchFeed
from foundation.tuning.methods import Method
from foundation.tuning.objective import Forward, tuning_losses
from foundation.tuning.samples import FewScans
from foundation.tuning.setup import identity
from foundation.tuning.tasks import PUBLISHED
from foundation.tuning.tuner import Parameters, Tuner

_VALIDATION_OVERLAP = 0.25
_TEXT_BALANCE = 0.3  # of the text-driven head, as in every other method


def transfer_method(
    head: str,
    preprocessing: Preprocessing,
    steps: int,
    *,
    batch_size: int = 1,
    learning_rate: float = PUBLISHED.learning_rate,
    voxels: int | None = None,
) -> Method:
    """The published training, at any length: a tenth warms up, a twentieth passes per validation.

    All weights learn at one rate; nothing stops early. Deviations: the cosine ends at a twentieth
    of the rate, gradients are clipped, and `FewScans` places four of five patches on a class, every
    class alike, where the published crops are on a voxel of any class two times of three.
    head: text, softmax or sigmoid. voxels: of a patch, that the loss looks at; all if not given.

    Raises:
        UsageError: a number that is not above 0.
    """
    if voxels is not None and voxels < 1:
        raise UsageError(f"voxels is {voxels}; it must be 1 or more.")
    return Method(
        name=head,
        branch="prompt",
        trains="all",
        protects="mask",
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


def linear_losses(given: Forward, balance: float, *, activation: Activation) -> dict[str, Tensor]:
    """Terms of the loss of a linear head, each a mean over the scans; their sum is to be minimised.

    softmax: Dice of the classes' probabilities, and cross-entropy over background and classes
    (`exclusive`), with `balance` as in `scan_losses`; logits are relative to background. sigmoid:
    Dice and binary cross-entropy. What a scan does not label is left out of both: of the softmax
    too, as if the class did not exist. Deviation from the published loss: Dice is of the classes
    alone that the patch shows; there, background counts as one of them, and an absent class is a
    constant.
    """
    if activation == "sigmoid":
        terms = published_losses(given.logits, given.target, given.annotated, given.weight)
    else:
        every = torch.ones(given.logits.shape[1], dtype=torch.bool, device=given.logits.device)
        terms = scan_losses(
            given.logits,
            given.target,
            given.annotated,
            given.weight,
            balance=balance,
            exclusive=every,
        )
        del terms["binary"]
    return {name: values.mean() for name, values in terms.items()}


def build_transfer(
    network: LinearNetwork | UniversalModel,
    data: TuningData,
    method: Method,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    progress: bool = True,
) -> Tuner:
    """The tuning of all of a network on all of its classes; see `Tuner` for what `folder` receives.

    Classes that no training scan shows are allowed: what a scan says of them is that they are
    absent, where it labels them.

    Raises:
        UsageError: the patch does not fit the backbone; or `folder` holds another tuning.
    """
    check_patch(network)
    network.to(device).train()
    pre, classes = network.config.preprocessing, network.config.class_names
    # Feed, validation and identity ask for no more than both have: config, classes, `logits_at`.
    model = cast(UniversalModel, network)
    grid = PatchGrid(pre.patch_size, pre.spacing_mm[0], pre.hu_windows, method.voxels, classes)
    scans = FewScans(data.train, classes)
    feed = PatchFeed(model, Mixture([scans], seed), grid, method.batch_size, None, device)

    def check() -> dict[str, float]:
        totals = validate(model.eval(), data.validation, _VALIDATION_OVERLAP, classes)
        model.train()
        return mean_dice(totals, classes)[0]

    tensors = dict(network.named_parameters())
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    known = identity(model, data, classes, method, seed)
    # As JSON gives it back: lists for tuples.
    known["preprocessing"] = {k: _plain(v) for k, v in asdict(pre).items()}
    if isinstance(network, LinearNetwork):
        losses = partial(linear_losses, activation=network.activation)
    else:
        exclusive = torch.ones(len(classes), dtype=torch.bool, device=device)
        losses = partial(tuning_losses, exclusive=exclusive, distil=0.0)
    return Tuner(
        network,
        Parameters(tensors, dict.fromkeys(tensors, method.learning_rate)),
        feed,
        losses,
        method,
        check,
        folder,
        known,
        progress=progress,
    )


def check_patch(network: LinearNetwork | UniversalModel) -> None:
    """Refuse a patch that the backbone cannot take.

    Raises:
        UsageError: a side is no multiple of its divisor, or all are the coarsest stride.
    """
    size, backbone = network.config.preprocessing.patch_size, network.backbone
    if any(n % backbone.divisor for n in size) or all(n <= backbone.strides[-1] for n in size):
        raise UsageError(
            f"The patch is {size} voxels; {network.config.backbone} needs multiples of "
            f"{backbone.divisor}, one side of them {2 * backbone.strides[-1]} or more."
        )


def _plain(value: object) -> object:
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
