"""Starting points for transfer: pretrained or random weights, a head, and how scans are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from foundation.adapting.low_rank import plain_state
from foundation.config import Activation, ClassSpec, ModelConfig, NetworkConfig, Preprocessing
from foundation.errors import UsageError
from foundation.hub.cards import card_names
from foundation.hub.load import from_pretrained
from foundation.model import Model, PlainModel, UniversalModel
from foundation.networks.backbones import BACKBONES
from foundation.networks.encoder import check_patch
from foundation.networks.protocol import require
from foundation.text import MINILM, class_prompt, encode_prompts, load_bank, mean_and_scale
from foundation.tuning.tasks import PUBLISHED

HEADS = ("softmax", "sigmoid", "text")


def published_preprocessing() -> Preprocessing:
    """Return how the published protocol reads scans."""
    return Preprocessing(
        spacing_mm=(PUBLISHED.spacing_mm,) * 3,
        hu_windows=(PUBLISHED.hu_window,),
        patch_size=(PUBLISHED.patch_size,) * 3,
    )


def transfer_preprocessing(
    model: Model,
    *,
    spacing_mm: float | None = None,
    hu_window: tuple[float | None, float | None] = (None, None),
    patch_size: int | None = None,
) -> Preprocessing:
    """Choose how a transfer reads scans.

    A model that reads one HU window at the published spacing gets the published preprocessing; any
    other keeps its own.

    Args:
        model: Where the transfer starts from.
        spacing_mm: Another spacing.
        hu_window: Another (low, high); None keeps that end.
        patch_size: Another number of voxels along each axis.

    Raises:
        UsageError: A window for a model that reads several; or a value that is not allowed.
    """
    chosen, published = model.config.preprocessing, published_preprocessing()
    if chosen.channels == 1 and chosen.spacing_mm == published.spacing_mm:
        chosen = published
    if hu_window != (None, None):
        if chosen.channels > 1:
            raise UsageError(
                f"{model.config.name} reads the HU windows {chosen.hu_windows}, and was trained "
                "with them; another window is for weights that read one."
            )
        low, high = (
            own if given is None else given
            for own, given in zip(chosen.hu_windows[0], hu_window, strict=True)
        )
        chosen = replace(chosen, hu_windows=((low, high),))
    if spacing_mm is not None:
        chosen = replace(chosen, spacing_mm=(spacing_mm,) * 3)
    if patch_size is not None:
        chosen = replace(chosen, patch_size=(patch_size,) * 3)
    return chosen


def random_model(name: str | UniversalModel, classes: Sequence[str], seed: int) -> UniversalModel:
    """Build a text-driven model with random weights.

    Args:
        name: A backbone, which is read as published; or weights, as `from_pretrained` takes them
            or loaded, whose architecture, classes and preprocessing are kept.
        classes: Names of the classes, for a backbone.
        seed: Of the weights.

    Raises:
        UsageError: `name` is neither.
        HubError, WeightsError: The weights cannot be loaded.
    """
    if isinstance(name, str) and name in BACKBONES:
        config = ModelConfig(
            name=f"random {name}",
            backbone=name,
            classes=tuple(ClassSpec(each, class_prompt(each, MINILM)) for each in classes),
            text=MINILM,
            standardise_text=True,
            preprocessing=published_preprocessing(),
        )
        rows = encode_prompts(MINILM, [spec.prompt for spec in config.classes])
        shift, scale = mean_and_scale(load_bank().embeddings)
    elif isinstance(name, Model) or _is_weights(name):
        trained = name if isinstance(name, Model) else from_pretrained(name)
        require(trained, "logits", "A random start by the name of weights")
        config = replace(trained.config, name=f"random {trained.config.name}")
        rows = trained.prompt_embedding
        if config.standardise_text:
            shift, scale = trained.head.text_shift, float(trained.head.text_scale)
    else:
        raise UsageError(
            f"Unknown backbone {name!r}. Choose from {', '.join(BACKBONES)}, or take the "
            f"architecture of weights: {', '.join(card_names())}, a folder, org/name."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UniversalModel(config, rows).eval()
    if config.standardise_text:  # these belong to the text encoder: they are not learnt
        model.head.text_shift.copy_(shift)
        model.head.text_scale.fill_(scale)
    return model


def _is_weights(name: str) -> bool:
    return name in card_names() or Path(name).exists() or "/" in name


def transfer_model(
    start: Model,
    classes: Sequence[str],
    head: str = "softmax",
    *,
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
) -> Model:
    """Copy the backbone of a model under a head for other classes.

    Args:
        start: Pretrained, or a `random_model`.
        classes: Names of the classes.
        head: "softmax" or "sigmoid", a new head without text; "text", the model's own text-driven
            head with the prompts of the classes.
        preprocessing: In place of the model's own; with as many HU windows.
        seed: Of the weights of a new head.

    Returns:
        The model, in evaluation mode; `start` is not changed.

    Raises:
        UsageError: Another number of HU windows, no class, an unknown head, a patch that does not
            fit the backbone, or the head is to be kept of a model without text.
        MissingExtraError, HubError, WeightsError: A prompt is not in the bank, and the text encoder
            of the weights cannot be used.
    """
    config = start.config
    chosen = config.preprocessing if preprocessing is None else preprocessing
    if chosen.channels != config.preprocessing.channels:
        raise UsageError(
            f"{config.name} reads {config.preprocessing.channels} HU windows, not "
            f"{chosen.channels}: {chosen.hu_windows}. Give as many, or keep its own."
        )
    if not classes:
        raise UsageError("No class to learn was given; name at least one.")
    if head not in HEADS:
        raise UsageError(f"Unknown head {head!r}; choose softmax, sigmoid or text.")
    model: Model
    if head == "text":
        require(start, "logits", "Keeping the text-driven head")
        assert isinstance(start, UniversalModel)
        text = start.config.text
        specs = tuple(ClassSpec(name, class_prompt(name, text)) for name in classes)
        own = replace(start.config, classes=specs, branches=(), preprocessing=chosen)
        model = UniversalModel(own, encode_prompts(text, [spec.prompt for spec in specs]))
        model.head.load_state_dict(plain_state(start.head))
    else:
        plain = NetworkConfig(
            name=config.name,
            classes=tuple(ClassSpec(name) for name in classes),
            preprocessing=chosen,
            activation=cast(Activation, head),
            backbone=config.backbone,
            backbone_options=config.backbone_options,
            licence=config.licence,
            licence_notice=config.licence_notice,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PlainModel(plain)
    model.backbone.load_state_dict(plain_state(start.backbone))
    check_patch(chosen.patch_size, model.backbone, config.backbone)
    return model.eval()
