"""Where a transfer starts from: weights, or chance in their place; and how it then reads scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from foundation.adapting.low_rank import plain_state
from foundation.config import ClassSpec, ModelConfig, Preprocessing
from foundation.errors import UsageError
from foundation.hub.cards import card_names
from foundation.hub.load import from_pretrained
from foundation.model import UniversalModel
from foundation.networks.backbones import BACKBONES
from foundation.text import MINILM, class_prompt, encode_prompts, load_bank, mean_and_scale
from foundation.tuning.tasks import PUBLISHED


def published_preprocessing() -> Preprocessing:
    """How the published protocol reads scans."""
    return Preprocessing(
        spacing_mm=(PUBLISHED.spacing_mm,) * 3,
        hu_windows=(PUBLISHED.hu_window,),
        patch_size=(PUBLISHED.patch_size,) * 3,
    )


def transfer_preprocessing(
    model: UniversalModel,
    *,
    spacing_mm: float | None = None,
    hu_window: tuple[float | None, float | None] = (None, None),
    patch_size: int | None = None,
) -> Preprocessing:
    """The published protocol's where the model's is of that kind, otherwise its own.

    Of that kind: one window of HU, at 1.5 mm. spacing_mm, hu_window, patch_size: instead of those;
    None in the window keeps that end.

    Raises:
        UsageError: a window of HU for a model that reads several; or a value that is not allowed.
    """
    chosen, published = model.config.preprocessing, published_preprocessing()
    if len(chosen.hu_windows) == 1 and chosen.spacing_mm == published.spacing_mm:
        chosen = published
    if hu_window != (None, None):
        if len(chosen.hu_windows) > 1:
            raise UsageError(
                f"{model.config.name} reads the HU windows {chosen.hu_windows}, and learnt from "
                "them; a window of one's own is for weights that read one."
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


def untrained_by_name(name: str, classes: Sequence[str], seed: int) -> UniversalModel:
    """An untrained model: of a backbone, read as published, or of weights without what they learnt.

    name: a key of `BACKBONES`, or what `from_pretrained` takes.

    Raises:
        UsageError: it is neither. HubError, WeightsError: the weights cannot be loaded.
    """
    if name in BACKBONES:
        return untrained(name, classes, published_preprocessing(), seed)
    if name not in card_names() and not Path(name).exists() and "/" not in name:
        raise UsageError(
            f"Unknown backbone {name!r}. Choose from {', '.join(BACKBONES)}, or take the "
            f"architecture of weights: {', '.join(card_names())}, a folder, org/name."
        )
    return untrained_like(from_pretrained(name), seed)


def untrained(
    backbone: str, classes: Sequence[str], preprocessing: Preprocessing, seed: int
) -> UniversalModel:
    """A model with the weights that chance gives it, by the name of its backbone.

    Raises:
        UsageError: no backbone has that name.
    """
    specs = tuple(ClassSpec(name, class_prompt(name, MINILM)) for name in classes)
    config = ModelConfig(
        name=f"untrained {backbone}",
        backbone=backbone,
        classes=specs,
        text=MINILM,
        standardise_text=True,
        preprocessing=preprocessing,
    )
    model = _drawn(config, encode_prompts(MINILM, [spec.prompt for spec in specs]), seed)
    mean, scale = mean_and_scale(load_bank().embeddings)
    model.head.text_shift.copy_(mean)
    model.head.text_scale.fill_(scale)
    return model


def untrained_like(model: UniversalModel, seed: int) -> UniversalModel:
    """The same architecture and preprocessing with the weights that chance gives it."""
    config = replace(model.config, name=f"untrained {model.config.name}")
    drawn = _drawn(config, model.prompt_embedding.cpu(), seed)
    if config.standardise_text:  # of the text encoder, not learnt
        drawn.head.text_shift.copy_(model.head.text_shift)
        drawn.head.text_scale.copy_(model.head.text_scale)
    return drawn


def _drawn(config: ModelConfig, prompt_embedding: Tensor, seed: int) -> UniversalModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UniversalModel(config, prompt_embedding).eval()


def keep_head(
    model: UniversalModel, classes: Sequence[str], preprocessing: Preprocessing
) -> UniversalModel:
    """A copy of a model, backbone and text-driven head, that is told other classes by prompts.

    Raises:
        MissingExtraError, HubError, WeightsError: a prompt is not in the bank, and the weights'
            text encoder cannot be used.
    """
    text = model.config.text
    specs = tuple(ClassSpec(name, class_prompt(name, text)) for name in classes)
    config = replace(model.config, classes=specs, branches=(), preprocessing=preprocessing)
    told = UniversalModel(config, encode_prompts(text, [spec.prompt for spec in specs]))
    told.backbone.load_state_dict(plain_state(model.backbone))
    told.head.load_state_dict(plain_state(model.head))
    return told.eval()
