"""Adapters: a few hundred kB that change a model and bring it classes, as a folder or on the Hub.

    add_adapter(model, "spine"); …train…; save_adapter(model, "spine-adapter")
    load_adapter(model, "spine-adapter"); set_adapter(model, None)   # the model as it was

A folder holds adapter.json (the base model and the SHA-256 of its weights, rank, classes), the
weights, SHA-256 sums and a card. An adapter fits the weights that it was made for, and no others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from foundation.adapting import low_rank as lora
from foundation.adapting.adapters import (
    HEAD_RANK,
    Adapter,
    AddedClasses,
    active_adapter,
    adapters,
    add_adapter,
    attach,
    base_sha256,
    check_name,
    check_new,
    details,
    inject,
    merge_adapter,
    named,
    set_adapter,
    speaking,
)
from foundation.config import AdapterConfig
from foundation.errors import UsageError, WeightsError, listed
from foundation.hub.cards import Card, adapter_card
from foundation.hub.download import Access
from foundation.hub.load import locate, refuse_changed, upload
from foundation.hub.saved import (
    CARD,
    SUMS,
    read_tensors,
    stored,
    verify_sums,
    write_sums,
    written_at_once,
)
from foundation.model import UniversalModel
from foundation.networks.branches import Branch
from foundation.text import check_compatible

__all__ = [
    "active_adapter",
    "adapters",
    "add_adapter",
    "load_adapter",
    "merge_adapter",
    "push_adapter_to_hub",
    "save_adapter",
    "set_adapter",
]

ADAPTER, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"
ADAPTER_FILES = (ADAPTER, ADAPTER_WEIGHTS)
_ROWS = "prompt_embedding"


def save_adapter(
    model: UniversalModel,
    folder: str | Path,
    name: str | None = None,
    *,
    dtype: torch.dtype | None = torch.float16,
    card: Card | None = None,
) -> Path:
    """Write an adapter as a folder that `load_adapter` reads; nothing is left if writing fails.

    name: the adapter that speaks if not given. dtype: of the stored weights; None keeps the
    model's own. card: README.md; generated if not given.

    Raises:
        UsageError: there is no such adapter; `folder` is a file or holds other files.
    """
    name = named(model, name)
    folder = Path(folder)
    adapter, added = details(model, name)
    config = AdapterConfig(
        name=name,
        base=model.config.name,
        base_sha256=base_sha256(model),
        rank=adapter.rank,
        alpha=adapter.alpha,
        classes=added.classes,
        branches=added.specs,
        text=model.config.text,
    )
    with written_at_once(folder, ADAPTER_FILES) as temporary:
        (temporary / ADAPTER).write_text(config.to_json(), encoding="utf-8")
        values = {
            key: stored(value, dtype)
            for key, value in _learnt(model, name, adapter.rank, added).items()
        }
        if added.classes:
            values[_ROWS] = stored(added.rows, torch.float32)  # as in a saved model
        save_file(values, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        sums = write_sums(temporary, ADAPTER_FILES)
        if card is None:
            card = adapter_card(
                name,
                model.config,
                classes=added.classes,
                base_sha256=config.base_sha256,
                parameters=sum(value.numel() for value in values.values()),
                rank=adapter.rank,
                sha256=sums,
            )
        (temporary / CARD).write_text(card.render(), encoding="utf-8")
    return folder


def load_adapter(
    model: UniversalModel,
    name_or_path: str | Path,
    name: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> str:
    """Give `model` a saved adapter, which speaks from now on; returns its name.

    name_or_path: a folder that `save_adapter` wrote, or `org/name` or `org/name@revision` on the
    Hub. name: to know it by; its own if not given. Otherwise as `from_pretrained`. The model stays
    as it was where this fails.

    Raises:
        UsageError: it was made for other weights, or the model has an adapter of this name or one
            of its classes.
        WeightsError: the folder is incomplete or damaged, or not an adapter of its configuration.
        HubError: there is no such folder or repository. MissingExtraError: peft is not installed.
    """
    access = Access(revision, cache_dir, local_files_only, token)
    folder = locate(name_or_path, (*ADAPTER_FILES, SUMS), access)
    verify_sums(folder, ADAPTER_FILES)
    text = (folder / ADAPTER).read_text(encoding="utf-8")
    config = AdapterConfig.from_json(text, str(folder / ADAPTER))
    name = config.name if name is None else name
    check_name(model, name)
    _check_base(model, config)
    values = read_tensors(folder / ADAPTER_WEIGHTS)
    with speaking(model, None):
        check_new(model, config.classes)
        branches = _build_branches(model, config, values, folder)
    inject(model, name, config.rank, config.alpha, branches, values=values)
    rows = values.get(_ROWS, torch.zeros(0, model.config.text.dim)).clone()
    added = AddedClasses(config.classes, config.branches, tuple(branches), rows)
    attach(model, name, Adapter(config.rank, config.alpha, added))
    return name


def push_adapter_to_hub(
    model: UniversalModel,
    repo_id: str,
    name: str | None = None,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload an adapter with universal-ct",
    card: Card | None = None,
    dtype: torch.dtype | None = torch.float16,
) -> str:
    """Save an adapter and upload it in one commit; returns the commit's address.

    name, card, dtype: as in `save_adapter`; the others as in `push_to_hub`.

    Raises:
        UsageError: as `save_adapter`; or the licence of the base forbids passing it on changed and
            `private` is not True.
        HubError: the Hub cannot be reached, or refuses.
    """
    refuse_changed(model.config, private)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_adapter(model, Path(temporary) / "adapter", name, dtype=dtype, card=card)
        access = Access(revision, token=token)
        return upload(folder, repo_id, access, model.config, private, commit_message)


def _learnt(model: UniversalModel, name: str, rank: int, added: AddedClasses) -> dict[str, Tensor]:
    """What an adapter has beyond its base: low-rank changes, and what its branches do not copy."""
    found: dict[str, Tensor] = {}
    for prefix, part in {"backbone": model.backbone, "head": model.head}.items():
        found |= {f"{prefix}.{key}": value for key, value in lora.tensors(part, name).items()}
    copied = _copied(model)
    for index, branch in enumerate(added.branches):
        for key, value in _changes(branch, name, rank).items():
            found[f"branches.{index}.{key}"] = value
        for key, value in lora.plain_state(branch).items():
            same = key in copied and torch.equal(value, copied[key].to(value))
            if not same:
                found[f"branches.{index}.{key}"] = value
    return found


def _changes(branch: Branch, name: str, rank: int) -> dict[str, Tensor]:
    """The low-rank changes of a branch; zeros where it was added after the adapter was."""
    found = lora.tensors(branch, name)
    if branch.head is None or found:
        return found
    shapes = lora.shapes(branch.head, max(rank, HEAD_RANK))
    return {f"head.{key}": torch.zeros(shape) for key, shape in shapes.items()}


def _copied(model: UniversalModel) -> dict[str, Tensor]:
    """What a branch's head starts as: the tensors of the model's own."""
    return {f"head.{key}": value for key, value in lora.plain_state(model.head).items()}


def _check_base(model: UniversalModel, config: AdapterConfig) -> None:
    actual = base_sha256(model)
    if actual != config.base_sha256:
        raise UsageError(
            f"The adapter {config.name!r} was made for {config.base!r} with weights "
            f"{config.base_sha256[:12]}…; this model, {model.config.name!r}, has {actual[:12]}…. "
            "Load the weights that it was made for."
        )
    check_compatible(model.config.text, config.text)


def _build_branches(
    model: UniversalModel, config: AdapterConfig, values: Mapping[str, Tensor], folder: Path
) -> list[Branch]:
    """The adapter's branches, without their low-rank changes; checks the names of all tensors.

    Raises:
        WeightsError: tensors are missing or unexpected, or have other shapes.
    """
    copied = _copied(model)
    expected = _expected_changes(model, config.rank)
    optional: dict[str, tuple[int, ...]] = {}
    if config.classes:
        expected[_ROWS] = (len(config.classes), model.config.text.dim)
    with torch.random.fork_rng(devices=[]):
        branches = [Branch(spec, model.backbone, model.config) for spec in config.branches]
    for index, branch in enumerate(branches):
        prefix = f"branches.{index}."
        for key, value in branch.state_dict().items():
            shelf = optional if key in copied else expected
            shelf[prefix + key] = tuple(value.shape)
        if branch.head is not None:
            changes = lora.shapes(branch.head, max(config.rank, HEAD_RANK))
            expected |= {f"{prefix}head.{key}": shape for key, shape in changes.items()}
    _check_tensors(values, expected, optional, folder)
    for index, branch in enumerate(branches):
        given = {**copied, **lora.below(values, f"branches.{index}.")}
        branch.load_state_dict({key: given[key] for key in branch.state_dict()})
        branch.to(model.prompt_embedding)
    return branches


def _expected_changes(model: UniversalModel, rank: int) -> dict[str, tuple[int, ...]]:
    parts = {"backbone.": model.backbone, "head.": model.head}
    return {
        prefix + key: shape
        for prefix, part in parts.items()
        for key, shape in lora.shapes(part, rank).items()
    }


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
            f"{folder / ADAPTER_WEIGHTS} is not the adapter it should be: it {'; it '.join(said)}. "
            "Save or download it again."
        )
