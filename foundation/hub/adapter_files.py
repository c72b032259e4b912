"""An adapter on disk: a small folder that changes a model and brings it classes.

    save_adapter(model, "spine-adapter")
    model = from_pretrained("spine-adapter")          # its base, with the adapter on
    load_adapter(from_pretrained(BASE), "spine-adapter")

The layout is peft's own: adapter_config.json and adapter_model.safetensors are what
`peft.PeftModel.from_pretrained(base, folder)` reads. Beside them lie universal_ct.json (the base
with the SHA-256 of its weights, and the classes), added_classes.safetensors (the prompts and
branches of the classes), SHA-256 sums and a card. An adapter fits the weights that it was made for,
and no others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from foundation.adapting import low_rank
from foundation.adapting.adapters import (
    Adapter,
    AddedClasses,
    activated,
    base_sha256,
    check_name,
    check_new,
    details,
    head_rank,
    inject,
    named_adapter,
    set_adapter,
)
from foundation.config import AdapterConfig, Origin
from foundation.errors import UsageError, WeightsError, listed
from foundation.files import read_text
from foundation.hub.cards import Card
from foundation.hub.folder import (
    ADAPTER_FILES,
    ADDED_CLASSES,
    CARD,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    UNIVERSAL_CT,
    verify_sums,
    write_sums,
    written_at_once,
)
from foundation.hub.new_cards import Results, adapter_card
from foundation.hub.saved import unwrapped
from foundation.hub.tensors import read_tensors, stored
from foundation.model import (
    UniversalModel,
    check_finite,
    check_types,
    fill,
    without_memory,
)
from foundation.networks.branches import Branch
from foundation.text import check_compatible

_PEFT_PREFIX = "base_model.model."  # before each name in a file of peft's
_ROWS = "prompt_embedding"
_PARTS = ("backbone", "head")


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    card: Card | None = None,
    results: Results | None = None,
    notes: str = "",
    dtype: torch.dtype | None = torch.float16,
    shared: bool = False,
) -> Path:
    """Write an adapter as a folder that `from_pretrained`, `load_adapter` and peft read.

    Nothing is left if writing fails.

    Args:
        model: It has the adapter; also inside `torch.compile` or a wrapper for several devices.
        folder: New, empty, or that of an earlier adapter, which is replaced.
        name: Of the adapter; the active one if not given.
        card: README.md, in place of `results` and `notes`.
        results: What was measured with the adapter, for its card.
        notes: Further sections for the card, Markdown.
        dtype: Of the stored weights; None keeps the model's own.
        shared: Leave out where on this machine the base lies, for others to read.

    Raises:
        UsageError: There is no such adapter; `folder` is a file or holds other files.
    """
    model, folder = unwrapped(model, UniversalModel), Path(folder)
    name = named_adapter(model, name)
    adapter, added = model.adapters.known[name], details(model, name)
    origin = model.origin or Origin(adapter.base)
    layers = [
        f"{part}.{key}" for part in _PARTS for key in low_rank.adaptable(getattr(model, part))
    ]
    config = AdapterConfig(
        name=name,
        base=origin.name,
        base_source=origin.source,
        base_folder="" if shared or origin.source else _relative(origin.path, folder),
        base_sha256=base_sha256(model),
        rank=adapter.rank,
        alpha=adapter.alpha,
        target_modules=low_rank.target_pattern(layers),
        classes=added.classes,
        branches=added.specs,
        text=model.config.text,
    )
    own = _own_tensors(model, name, adapter.rank, added)
    tensors = {
        PEFT_WEIGHTS: {
            f"{_PEFT_PREFIX}{part}.{key}.weight": stored(value, dtype)
            for part in _PARTS
            for key, value in low_rank.tensors(getattr(model, part), name).items()
        },
        ADDED_CLASSES: {key: stored(value, dtype) for key, value in own.items()},
    }
    if added.classes:
        tensors[ADDED_CLASSES][_ROWS] = stored(added.rows, torch.float32)  # as in a saved model
    with written_at_once(folder, ADAPTER_FILES) as temporary:
        (temporary / UNIVERSAL_CT).write_text(config.to_json(), encoding="utf-8")
        (temporary / PEFT_CONFIG).write_text(config.to_peft(), encoding="utf-8")
        for file, values in tensors.items():
            save_file(values, temporary / file, metadata={"format": "pt"})
        sums = write_sums(temporary, ADAPTER_FILES)
        count = sum(value.numel() for values in tensors.values() for value in values.values())
        card = card or adapter_card(config, model.config, count, sums, results=results, notes=notes)
        (temporary / CARD).write_text(card.render(), encoding="utf-8")
    return folder


def read_config(folder: Path) -> AdapterConfig:
    """Read what a complete adapter's folder says of it; this needs no peft.

    Args:
        folder: Of the adapter.

    Raises:
        WeightsError: A file is missing or does not have its SHA-256, or is not what we write.
    """
    verify_sums(folder, ADAPTER_FILES)
    ours, pefts = (
        read_text(folder / name, error=WeightsError) for name in (UNIVERSAL_CT, PEFT_CONFIG)
    )
    return AdapterConfig.from_json(ours, pefts, str(folder))


def put_on(
    model: UniversalModel, folder: Path, config: AdapterConfig, name: str | None = None
) -> str:
    """Give `model` the adapter of a folder and activate it; returns its name.

    The model stays as it was where this fails.

    Args:
        model: It is changed in place.
        folder: Of the adapter.
        config: What the folder says, see `read_config`.
        name: To know the adapter by; its own if not given.

    Raises:
        UsageError: It was made for other weights, or the model has an adapter of this name or one
            of its classes.
        WeightsError: The tensors are not an adapter of its configuration.
        MissingExtraError: peft is not installed.
    """
    name = config.name if name is None else name
    check_name(model, name)
    _check_base(model, config, folder)
    values = {
        key.removeprefix(_PEFT_PREFIX).removesuffix(".weight"): value
        for key, value in read_tensors(folder / PEFT_WEIGHTS).items()
    }
    values |= read_tensors(folder / ADDED_CLASSES)
    with activated(model, None):
        check_new(model, config.classes)
        _check_classes(model, config)
        branches = _build_branches(model, config, values, folder)
    inject(model, name, config.rank, config.alpha, branches, values=values)
    rows = values.get(_ROWS, torch.zeros(0, model.config.text.dim)).clone()
    added = AddedClasses(config.classes, config.branches, tuple(branches), rows)
    model.adapters.known[name] = Adapter(config.rank, config.alpha, config.base, added)
    set_adapter(model, name)
    return name


def _relative(base: str, folder: Path) -> str:
    """Where the base lies, as seen from the adapter's folder; empty where no path leads there."""
    try:
        return os.path.relpath(base, folder.absolute()) if base else ""
    except ValueError:  # another drive of Windows
        return ""


def _own_tensors(
    model: UniversalModel, name: str, rank: int, added: AddedClasses
) -> dict[str, Tensor]:
    """What an adapter's branches learnt; of their copies of the head, only what differs from it."""
    found: dict[str, Tensor] = {}
    copied = _copied(model)
    for index, branch in enumerate(added.branches):
        for key, value in _changes(branch, name, rank).items():
            found[f"branches.{index}.{key}"] = value
        for key, value in low_rank.plain_state(branch).items():
            if key not in copied or not torch.equal(value, copied[key].to(value)):
                found[f"branches.{index}.{key}"] = value
    return found


def _changes(branch: Branch, name: str, rank: int) -> dict[str, Tensor]:
    """The low-rank changes of a branch; zeros where it was added after the adapter was."""
    found = low_rank.tensors(branch, name)
    if branch.head is None or found:
        return found
    shapes = low_rank.shapes(branch.head, head_rank(rank))
    return {f"head.{key}": torch.zeros(shape) for key, shape in shapes.items()}


def _copied(model: UniversalModel) -> dict[str, Tensor]:
    """What a branch's head starts as: the tensors of the model's own."""
    return {f"head.{key}": value for key, value in low_rank.plain_state(model.head).items()}


def _check_base(model: UniversalModel, config: AdapterConfig, folder: Path) -> None:
    actual = base_sha256(model)
    if actual != config.base_sha256:
        raise UsageError(
            f"The adapter {config.name!r} was made for {config.base!r} with weights "
            f"{config.base_sha256[:12]}…; this model, {model.config.name!r}, has {actual[:12]}…. "
            "Load the weights that it was made for, by from_pretrained(…), and put the adapter on "
            f"them: model.load_adapter({str(folder)!r})."
        )
    check_compatible(model.config.text, config.text)


def _check_classes(model: UniversalModel, config: AdapterConfig) -> None:
    """Refuse classes that the model's configuration could not hold, before anything is changed."""
    own = model.config
    try:
        replace(
            own,
            classes=(*own.classes, *config.classes),
            branches=(*own.branches, *config.branches),
        )
    except UsageError as error:
        raise WeightsError(
            f"The adapter {config.name!r} does not fit {own.name!r}: {error}"
        ) from error


def _build_branches(
    model: UniversalModel, config: AdapterConfig, values: Mapping[str, Tensor], folder: Path
) -> list[Branch]:
    """The adapter's branches, without their low-rank changes; checks the names of all tensors.

    Raises:
        WeightsError: tensors are missing or unexpected, have other shapes, or are no finite
            floating-point numbers.
    """
    copied = _copied(model)
    expected = {
        f"{part}.{key}": shape
        for part in _PARTS
        for key, shape in low_rank.shapes(getattr(model, part), config.rank).items()
    }
    optional: dict[str, tuple[int, ...]] = {}
    if config.classes:
        expected[_ROWS] = (len(config.classes), model.config.text.dim)
    makers = [partial(Branch, spec, model.backbone, model.config) for spec in config.branches]
    branches = [without_memory(make) for make in makers]
    for index, branch in enumerate(branches):
        prefix = f"branches.{index}."
        for key, value in branch.state_dict().items():
            shelf = optional if key in copied else expected
            shelf[prefix + key] = tuple(value.shape)
        if branch.head is not None:
            changes = low_rank.shapes(branch.head, head_rank(config.rank))
            expected |= {f"{prefix}head.{key}": shape for key, shape in changes.items()}
    _check_tensors(values, expected, optional, folder)
    filled = []
    for index, (make, branch) in enumerate(zip(makers, branches, strict=True)):
        given = {**copied, **low_rank.below(values, f"branches.{index}.")}
        # Copies: the head of a branch starts as the model's own, and then learns apart from it.
        state = {key: given[key].detach().clone() for key in branch.state_dict()}
        with torch.random.fork_rng(devices=[]):
            filled.append(fill(make, branch, state, str(folder)).to(model.prompt_embedding))
    return filled


def _check_tensors(
    values: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:
    allowed = {**optional, **expected}
    wrong = {
        "lacks": [key for key in expected if key not in values],
        "has the unknown": [key for key in values if key not in allowed],
        "has another shape of": [
            key for key, value in values.items() if allowed.get(key, value.shape) != value.shape
        ],
    }
    said = [f"{what} {listed(keys)}" for what, keys in wrong.items() if keys]
    if said:
        raise WeightsError(
            f"{folder} does not hold the adapter that it should: it {'; it '.join(said)}. "
            "Save or download it again."
        )
    check_types(dict.fromkeys(values, torch.empty(0)), values, str(folder))
    check_finite(values, str(folder))
