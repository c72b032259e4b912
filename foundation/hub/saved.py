"""A saved model is a folder: configuration, weights, prompt embeddings, card and SHA-256 sums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from foundation.adapting.adapters import base_sha256
from foundation.adapting.low_rank import has_adapters
from foundation.config import ModelConfig, Origin, read_config
from foundation.errors import UsageError, WeightsError
from foundation.files import read_text
from foundation.hub.cards import Card, card_names, read_card
from foundation.hub.folder import (
    CALIBRATION,
    CARD,
    CONFIG,
    EVAL_RESULTS,
    PLAIN,
    PROMPTS,
    RECORDS,
    SUMMED,
    SUMS,
    WEIGHTS,
    read_sums,
    summed_files,
    verify_sums,
    write_sums,
    written_at_once,
)
from foundation.hub.new_cards import Base, Results, generate_card
from foundation.hub.tensors import opened, read_header, read_tensors, sort_metadata, stored
from foundation.imaging.expected_dice import Calibration
from foundation.model import (
    Model,
    UniversalModel,
    build_model,
    check_finite,
    check_types,
    weights_of,
)

_PROMPT_KEY = "prompt_embedding"
_Kind = TypeVar("_Kind", bound=Model)


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    card: Card | None = None,
    results: Results | None = None,
    base: Base | None = None,
    notes: str = "",
    dtype: torch.dtype | None = None,
    records: str | Path | None = None,
) -> Path:
    """Write `model` as a folder that `from_pretrained` loads; nothing is left if writing fails.

    Weights that were loaded and not changed keep the card that they came with. Any others get one
    that names the model they were loaded from as their base.

    Args:
        model: A model of ours, also inside `torch.compile` or a wrapper for several devices.
        folder: New, empty, or that of an earlier saved model, which is replaced.
        card: README.md, in place of all that follows.
        results: What was measured with the model, for its card.
        base: What the model was trained from, for its card; see `base_of`. By default what it was
            loaded from.
        notes: Further sections for the card, Markdown.
        dtype: Of the stored weights (torch.float16 halves the file); the model's own if not given.
        records: A file of what was measured with these weights, which `universal-ct reproduce`
            reads; it is copied. Weights that were not changed keep those that they came with.

    Raises:
        UsageError: `folder` is a file, or holds files that are not part of a saved model; the
            model has adapters, or is no model of ours.
    """
    model, folder = unwrapped(model, Model), Path(folder)
    if has_adapters(model):
        raise UsageError(
            "The model has adapters, which are saved apart: save_adapter. For one folder with all "
            "in it, save what merge_adapter returns."
        )
    loaded = None if card or base else _as_loaded(model)
    measured: list[Path] = []
    if loaded is not None and not (results or notes) and _unchanged(model, loaded):
        card, measured = _card_of(model), _measured(model)
    if records is not None:
        measured = [Path(records)]
    if card is None and base is None and loaded is not None:
        base = base_of(loaded, model.origin)
    names = SUMMED if isinstance(model, UniversalModel) else PLAIN
    with written_at_once(folder, names) as temporary:
        (temporary / CONFIG).write_text(model.config.to_json(), encoding="utf-8")
        state = {name: stored(tensor, dtype) for name, tensor in _clean(weights_of(model)).items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        if isinstance(model, UniversalModel):
            # Always float32: a few hundred kB, and new classes are compared with these rows.
            prompts = stored(model.prompt_embedding, torch.float32)
            metadata = {"format": "pt", **_origin(model.config)}
            save_file({_PROMPT_KEY: prompts}, temporary / PROMPTS, metadata=metadata)
            sort_metadata(temporary / PROMPTS)
        sums = write_sums(temporary, names)
        if model.calibration and model.calibration.weights_sha256 == sums[WEIGHTS]:
            model.calibration.write(temporary / CALIBRATION)
            sums = write_sums(temporary, (*names, CALIBRATION), sums)
        if card is None:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            card = generate_card(
                model.config, parameters, sums, base=base, results=results, notes=notes
            )
        (temporary / CARD).write_text(card.render(), encoding="utf-8")
        for path in measured:
            if path.is_dir():
                shutil.copytree(path, temporary / path.name)
            else:
                shutil.copy(path, temporary / RECORDS)
    return folder


def unwrapped(model: nn.Module, kind: type[_Kind]) -> _Kind:
    """Return the model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Args:
        model: As it is used.
        kind: `Model`, or `UniversalModel` where a text-driven one is needed.

    Raises:
        UsageError: There is no such model inside.
    """
    plain: object = model
    while not isinstance(plain, kind):
        parts = vars(plain).get("_modules", {})
        inner = parts.get("_orig_mod", parts.get("module"))
        if inner is None:
            raise UsageError(
                f"This is a {type(model).__name__}, not a {kind.__name__}. Give the whole model, "
                "as from_pretrained returns it; save an encoder or another part by torch.save."
            )
        plain = inner
    return plain


def base_of(model: Model, origin: Origin | None = None) -> Base:
    """Describe a model as the base of what is trained from it: for a card, before the training.

    Args:
        model: As it was loaded.
        origin: Where from; what the model itself says if not given.
    """
    origin = origin or model.origin or Origin(model.config.name)
    return Base(origin.name, origin.source, base_sha256(model))


def _as_loaded(model: Model) -> Model | None:
    """What the model was loaded from, read again; None if that is not there."""
    if model.origin is None or not Path(model.origin.path).is_dir():
        return None
    try:
        return load_folder(Path(model.origin.path))
    except WeightsError:
        return None


def _unchanged(model: Model, loaded: Model) -> bool:
    now, then = _clean(model.state_dict()), loaded.state_dict()
    return model.config == loaded.config and all(
        torch.equal(now[name], value.to(now[name])) for name, value in then.items()
    )


def _card_of(model: Model) -> Card | None:
    """The card that the model came with."""
    assert model.origin is not None
    if model.origin.source in card_names():
        return read_card(model.origin.source)
    path = Path(model.origin.path) / CARD
    return Card.read(model.config.name, path) if path.is_file() else None


def _measured(model: Model) -> list[Path]:
    """What the folder of unchanged weights says that was measured with them."""
    assert model.origin is not None
    paths = [Path(model.origin.path) / name for name in (RECORDS, EVAL_RESULTS)]
    return [path for path in paths if path.exists()]


def _clean(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict by the names that it has where no part is compiled."""
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}


def load_folder(folder: Path) -> Model:
    """Rebuild the model that `save_pretrained` wrote, on the CPU, in evaluation mode.

    Parameters come in float32 whatever they are stored in.

    Args:
        folder: Of the model.

    Raises:
        WeightsError: A file is missing or does not have its SHA-256; the keys, shapes and types of
            the weights are not exactly those of the model that the configuration describes, or a
            value is not finite; or the prompt embeddings are of other prompts, or of another text
            encoder.
    """
    names = summed_files(folder)
    verify_sums(folder, names)
    config_text = read_text(folder / CONFIG, error=WeightsError)
    config = read_config(config_text, str(folder / CONFIG))
    prompt_embedding = None
    if isinstance(config, ModelConfig):
        if PROMPTS not in names:
            verify_sums(folder)  # which says what is missing
        prompt_embedding = _read_prompts(folder / PROMPTS, config)
    weights = folder / WEIGHTS
    model = build_model(
        config,
        read_header(weights),
        prompt_embedding,
        str(folder),
        read=lambda: read_tensors(weights),
    )
    if CALIBRATION in names:
        model.calibration = Calibration.read(folder / CALIBRATION)
        _check_calibration(folder, model.calibration)
    return model


def save_calibration(folder: str | Path, calibration: Calibration) -> Path:
    """Put a calibration beside the weights of a saved model; an earlier one is replaced.

    Args:
        folder: Of the model.
        calibration: Of its weights.

    Returns:
        The file.

    Raises:
        WeightsError: The folder is incomplete or damaged, or holds other weights.
    """
    folder = Path(folder)
    names = [name for name in summed_files(folder) if name != CALIBRATION]
    verify_sums(folder, names)
    _check_calibration(folder, calibration)
    known = read_sums(folder / SUMS)
    sums = write_sums(folder, names, known)  # a file without a sum is not read
    calibration.write(folder / CALIBRATION)
    write_sums(folder, [*names, CALIBRATION], sums)
    return folder / CALIBRATION


def _check_calibration(folder: Path, calibration: Calibration) -> None:
    own = read_sums(folder / SUMS)[WEIGHTS]
    if calibration.weights_sha256 != own:
        raise WeightsError(
            f"The calibration for {folder} is of other weights: SHA-256 "
            f"{calibration.weights_sha256[:12]}… in place of {own[:12]}…. Delete its line in "
            f"{SUMS}, or calibrate again: python benchmarks/trust.py."
        )


def _origin(config: ModelConfig) -> dict[str, str]:
    """What prompt embeddings were made of: the encoder, and the sentence behind each row."""
    prompts = [spec.prompt for spec in config.classes]
    return {"text": json.dumps(asdict(config.text)), "prompts": json.dumps(prompts)}


def _read_prompts(path: Path, config: ModelConfig) -> Tensor:
    """The prompt embeddings (K, D), which say themselves what they are the embeddings of."""
    header = read_header(path)
    expected = (len(config.classes), config.text.dim)
    if set(header) != {_PROMPT_KEY} or tuple(header[_PROMPT_KEY].shape) != expected:
        found = {name: tuple(tensor.shape) for name, tensor in header.items()}
        raise WeightsError(
            f"{path} holds {found!r:.300}; the configuration asks for one tensor {_PROMPT_KEY!r} "
            f"of shape {expected}."
        )
    with opened(path) as file:
        metadata = file.metadata() or {}
    for name, wanted in _origin(config).items():
        if metadata.get(name) != wanted:
            raise WeightsError(
                f"{path} holds embeddings whose {name} is {metadata.get(name)}, but {CONFIG} says "
                f"{wanted}: embeddings of two encoders, or of other prompts, must not be mixed. "
                "Save the model again."
            )
    check_types({_PROMPT_KEY: torch.empty(0)}, header, str(path))
    tensors = read_tensors(path)
    check_finite(tensors, str(path))
    return tensors[_PROMPT_KEY]
