"""Adapters on a model in memory: added, switched, merged. Their files: `hub.adapter_files`.

Several adapters share one model, and one at a time speaks: with it, the model has its classes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from foundation.adapting import low_rank as lora
from foundation.config import BranchSpec, ClassSpec
from foundation.errors import UsageError, listed
from foundation.model import UniversalModel, build_model
from foundation.networks.branches import Branch
from foundation.taxonomy import normalise

HEAD_RANK = 8  # at least, in heads of added classes: rank 2 hardly tells five vertebrae apart
_BOOK = "_adapter_book"


@dataclass(frozen=True)
class AddedClasses:
    """Classes with their branches and prompt embeddings (k, D), apart from a model."""

    classes: tuple[ClassSpec, ...]
    specs: tuple[BranchSpec, ...]
    branches: tuple[Branch, ...]
    rows: Tensor


@dataclass(frozen=True)
class Adapter:
    """An adapter of a model. added: its classes, while another adapter speaks."""

    rank: int
    alpha: float
    added: AddedClasses | None = None


@dataclass
class _Book:
    """own: how many branches the model has without the adapter that speaks."""

    known: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    own: int = 0


def _book(model: UniversalModel) -> _Book:
    # In the model, so that it is copied with it; not in its class, which knows no adapters.
    book = model.__dict__.setdefault(_BOOK, _Book())
    assert isinstance(book, _Book)
    return book


def adapters(model: UniversalModel) -> tuple[str, ...]:
    """Names of the model's adapters, in the order in which they came."""
    return tuple(_book(model).known)


def active_adapter(model: UniversalModel) -> str | None:
    """Name of the adapter that speaks."""
    return _book(model).active


def add_adapter(
    model: UniversalModel,
    name: str,
    rank: int = 2,
    alpha: float | None = None,
    seed: int = 1,
    *,
    classes: Sequence[str] | None = None,
) -> None:
    """Give `model` an untrained adapter, which speaks from now on and says nothing yet.

    It changes the backbone's convolutions and linear layers and the linear layers of the head.
    Afterwards its parameters and those of its classes ask for gradients, and no others do. Of the
    copies of the head that its classes have, the large layers learn low-rank changes too, so that
    the copies need not be stored with the adapter.

    rank: of the changes. alpha: they are multiplied by alpha / rank; the rank if not given.
    seed: of the start. classes: names of added classes that go with the adapter, the model's last;
    if not given, all that were added since the model was built or loaded.

    Raises:
        UsageError: the name is taken or cannot be one, the rank is not positive, or `classes` are
            not the whole of the model's last branches.
        MissingExtraError: peft is not installed.
    """
    check_name(model, name)
    if rank < 1:
        raise UsageError(f"rank is {rank}; an adapter needs a rank of 1 or more.")
    set_adapter(model, None)
    own = _branches_before(model, classes)
    alpha = float(rank if alpha is None else alpha)
    inject(model, name, rank, alpha, list(model.branches)[own:], seed=seed)
    model.requires_grad_(False)
    book = _book(model)
    book.known[name] = Adapter(rank, alpha)
    book.active, book.own = name, own
    lora.switch(model, name)
    for key, tensor in model.branches[own:].named_parameters():
        tensor.requires_grad_(not key.endswith(".base_layer.weight"))


def set_adapter(model: UniversalModel, name: str | None) -> None:
    """Let the adapter of this name speak, with its classes; None: the model as it was, bit for bit.

    Raises:
        UsageError: there is no such adapter, or the model has one of its classes already.
    """
    book = _book(model)
    if name is not None and name not in book.known:
        known = listed(list(book.known)) or "none"
        raise UsageError(f"The model has no adapter {name!r}; it has {known}. Load it first.")
    if name == book.active:
        return
    if book.active is not None:
        book.known[book.active] = replace(book.known[book.active], added=_take_off(model, book.own))
        book.active = None
        lora.switch(model, None)
    if name is None:
        return
    added = book.known[name].added
    assert added is not None  # it does not speak, so its classes are put away
    check_new(model, added.classes)
    book.own = len(model.branches)
    _put_on(model, added)
    book.known[name] = replace(book.known[name], added=None)
    book.active = name
    lora.switch(model, name)


def merge_adapter(model: UniversalModel, name: str | None = None) -> UniversalModel:
    """A plain model that computes what `model` does with an adapter, in evaluation mode.

    `model` itself is not changed. name: the adapter that speaks if not given.

    Raises:
        UsageError: there is no such adapter.
    """
    name = named(model, name)
    with speaking(model, name):
        state = lora.plain_state(model, name)
        rows = model.prompt_embedding.detach().clone()
        merged = build_model(model.config, state, rows, model.config.name)
    return merged.to(rows.device, rows.dtype)


@contextmanager
def speaking(model: UniversalModel, name: str | None) -> Iterator[None]:
    """Inside `with`, the adapter of this name speaks; afterwards the one that did before."""
    before = active_adapter(model)
    set_adapter(model, name)
    try:
        yield
    finally:
        set_adapter(model, before)


def named(model: UniversalModel, name: str | None) -> str:
    """The adapter that is meant: the one of this name, or the one that speaks.

    Raises:
        UsageError: there is none.
    """
    name = active_adapter(model) if name is None else name
    if name is None or name not in _book(model).known:
        known = listed(list(_book(model).known)) or "none"
        raise UsageError(f"The model has no adapter {name!r}; it has {known}.")
    return name


def details(model: UniversalModel, name: str) -> tuple[Adapter, AddedClasses]:
    """An adapter and its classes, whether it speaks or not."""
    adapter = _book(model).known[name]
    if adapter.added is not None:
        return adapter, adapter.added
    return adapter, _cut(model, _book(model).own)


def attach(model: UniversalModel, name: str, adapter: Adapter) -> None:
    """Make an adapter known that was injected, and let it speak."""
    _book(model).known[name] = adapter
    set_adapter(model, name)


def inject(
    model: UniversalModel,
    name: str,
    rank: int,
    alpha: float,
    branches: Sequence[nn.Module],
    *,
    seed: int = 1,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Low-rank layers in backbone, head and the heads of `branches`, which are the adapter's own.

    values: what they learnt, by name; they start by `seed` if not given.

    Raises:
        MissingExtraError: peft is not installed.
    """
    parts: dict[str, nn.Module] = {"backbone.": model.backbone, "head.": model.head}
    heads = {
        f"branches.{index}.head.": branch.head
        for index, branch in enumerate(branches)
        if isinstance(branch, Branch) and branch.head is not None
    }
    own_rank = max(rank, HEAD_RANK)
    for prefix, part in {**parts, **heads}.items():
        low_rank = own_rank if prefix in heads else rank
        learnt = None if values is None else lora.below(values, prefix)
        lora.inject(part, name, low_rank, alpha * low_rank / rank, seed=seed, values=learnt)


def base_sha256(model: UniversalModel) -> str:
    """SHA-256 of a model's backbone and head without adapters, by which an adapter knows its base.

    Of the values in half precision, since weights may be stored so and are the same ones still.
    """
    digest = hashlib.sha256()
    for part in (model.backbone, model.head):
        for key, value in sorted(lora.plain_state(part).items()):
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.detach().half().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def check_name(model: UniversalModel, name: str) -> None:
    """Refuse a name that the model has an adapter of, or that no adapter can have.

    Raises:
        UsageError: see above.
    """
    if name in _book(model).known:
        raise UsageError(f"The model has an adapter {name!r} already. Give another name.")
    if not re.fullmatch(r"[\w-]+", name):
        raise UsageError(f"{name!r} cannot name an adapter: use letters, digits, '_' and '-'.")


def check_new(model: UniversalModel, classes: Sequence[ClassSpec]) -> None:
    """Refuse classes that the model has.

    Raises:
        UsageError: see above.
    """
    known = {normalise(name) for name in model.classes}
    same = [spec.name for spec in classes if normalise(spec.name) in known]
    if same:
        raise UsageError(
            f"The adapter brings {listed(same)}, which the model has already. Give it to the model "
            "as it was before, without them."
        )


def _branches_before(model: UniversalModel, classes: Sequence[str] | None) -> int:
    """How many of the model's branches are not the new adapter's."""
    if classes is None:
        return model.loaded_branches
    left = list(classes)
    own = len(model.branches)
    while (
        left
        and own
        and list(model.config.branches[own - 1].classes)
        == left[-len(model.config.branches[own - 1].classes) :]
    ):
        own -= 1
        del left[-len(model.config.branches[own].classes) :]
    if left:
        raise UsageError(
            f"{listed(list(classes))} are not the classes that were added last, in order and group "
            f"by group. The model has {listed(list(model.classes))}."
        )
    return own


def _cut(model: UniversalModel, own: int) -> AddedClasses:
    """The model's branches from `own` on, and their classes."""
    specs = model.config.branches[own:]
    first = len(model.classes) - sum(len(spec.classes) for spec in specs)
    branches = [branch for branch in list(model.branches)[own:] if isinstance(branch, Branch)]
    rows = model.prompt_embedding[first:].clone()
    return AddedClasses(model.config.classes[first:], specs, tuple(branches), rows)


def _take_off(model: UniversalModel, own: int) -> AddedClasses:
    added = _cut(model, own)
    first = len(model.classes) - len(added.classes)
    model.config = replace(
        model.config, classes=model.config.classes[:first], branches=model.config.branches[:own]
    )
    model.branches = nn.ModuleList(list(model.branches)[:own])
    model.prompt_embedding = model.prompt_embedding[:first].clone()
    return added


def _put_on(model: UniversalModel, added: AddedClasses) -> None:
    config, rows = model.config, model.prompt_embedding
    model.config = replace(
        config,
        classes=(*config.classes, *added.classes),
        branches=(*config.branches, *added.specs),
    )
    for branch in added.branches:  # the model may have moved while they were away
        model.branches.append(branch.to(rows.device, rows.dtype).train(model.training))
    model.prompt_embedding = torch.cat([rows, added.rows.to(rows)])
