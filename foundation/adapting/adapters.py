"""Adapters of a model in memory: add one, activate one or none, merge one, delete one.

    add_adapter(model, "spine"); …train…; set_adapter(model, None)  # the model as it was

A model can hold several adapters; at most one is active. The model has an adapter's classes only
while it is active. Files of adapters: `foundation.hub.adapter_files`.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from foundation.adapting import low_rank
from foundation.config import BranchSpec, ClassSpec
from foundation.errors import UsageError, listed
from foundation.networks.branches import Branch
from foundation.taxonomy import normalise

if TYPE_CHECKING:
    from foundation.model import Model, UniversalModel

HEAD_RANK = 8  # at least, in heads of added classes: rank 2 hardly tells five vertebrae apart


@dataclass(frozen=True)
class AddedClasses:
    """Classes with what belongs to them, apart from a model.

    Attributes:
        classes: Names, prompts and parents of k classes.
        specs: Of their branches.
        branches: Their layers.
        rows: Prompt embeddings (k, D).
    """

    classes: tuple[ClassSpec, ...]
    specs: tuple[BranchSpec, ...]
    branches: tuple[Branch, ...]
    rows: Tensor


@dataclass(frozen=True)
class Adapter:
    """An adapter of a model.

    Attributes:
        rank: Of its low-rank changes.
        alpha: The changes are multiplied by alpha / rank.
        base: Name that the model had when the adapter was added.
        added: Its classes, kept here while it is not active; None while it is.
    """

    rank: int
    alpha: float
    base: str
    added: AddedClasses | None = None


@dataclass
class Adapters:
    """The adapters of one model: its attribute `adapters`.

    Attributes:
        loaded_branches: How many branches the model had when it was built or loaded.
        known: The adapters by name, in the order in which they were added.
        active: Name of the active adapter.
        own_branches: How many branches the model has without the active adapter.
    """

    loaded_branches: int = 0
    known: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    own_branches: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters, in the order in which they were added."""
        return tuple(self.known)


def add_adapter(
    model: UniversalModel,
    name: str,
    rank: int = 2,
    alpha: float | None = None,
    seed: int = 1,
    *,
    classes: Sequence[str] | None = None,
) -> None:
    """Give `model` an untrained adapter and activate it; until it is trained it changes nothing.

    It changes the backbone's convolutions and linear layers and the linear layers of the head.
    Afterwards its parameters and those of its classes ask for gradients, and no others do. Of the
    copies of the head that its classes have, the large layers learn low-rank changes too, so that
    the copies need not be stored with the adapter.

    Args:
        model: It is changed in place.
        name: Letters, digits, "_" and "-".
        rank: Of the changes.
        alpha: The changes are multiplied by alpha / rank; the rank if not given.
        seed: Of the adapter's random start.
        classes: Names of added classes that go with the adapter, the last of the model; all that
            were added since the model was built or loaded if not given.

    Raises:
        UsageError: The name is taken or cannot be one, the rank is not positive, or `classes` are
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
    held = model.adapters
    held.known[name] = Adapter(rank, alpha, model.config.name)
    held.active, held.own_branches = name, own
    low_rank.activate(model, name)
    for key, tensor in model.branches[own:].named_parameters():
        tensor.requires_grad_(not key.endswith(".base_layer.weight"))


def set_adapter(model: UniversalModel, name: str | None) -> None:
    """Activate an adapter, with its classes; with None the model is as it was, bit for bit.

    Args:
        model: It is changed in place.
        name: Of the adapter, or None.

    Raises:
        UsageError: There is no such adapter, or the model has one of its classes already.
    """
    held = model.adapters
    if name is not None:
        named_adapter(model, name)
    if name == held.active:
        return
    if held.active is not None:
        added = _take_off(model, held.own_branches)
        held.known[held.active] = replace(held.known[held.active], added=added)
        held.active = None
        low_rank.activate(model, None)
    if name is None:
        return
    added = details(model, name)
    check_new(model, added.classes)
    held.own_branches = len(model.branches)
    _put_on(model, added)
    held.known[name] = replace(held.known[name], added=None)
    held.active = name
    low_rank.activate(model, name)


def delete_adapter(model: UniversalModel, name: str | None = None) -> None:
    """Delete an adapter and its classes; without its last adapter a model has plain layers again.

    Args:
        model: It is changed in place.
        name: Of the adapter; the active one if not given.

    Raises:
        UsageError: There is no such adapter.
    """
    name = named_adapter(model, name)
    if name == model.adapters.active:
        set_adapter(model, None)
    low_rank.remove(model, name)
    del model.adapters.known[name]


def merge_adapter(
    model: UniversalModel, name: str | None = None, *, new_name: str | None = None
) -> UniversalModel:
    """Make a plain model that computes what `model` does with an adapter, in evaluation mode.

    Args:
        model: It is not changed.
        name: Of the adapter; the active one if not given.
        new_name: Of the new model; "<base>-<adapter>" if not given, since it is another model.

    Raises:
        UsageError: There is no such adapter.
    """
    name = named_adapter(model, name)
    base = model.adapters.known[name].base
    with activated(model, name):
        merged = copy.deepcopy(model)
    low_rank.merge(merged, name)
    merged.adapters = Adapters(len(merged.config.branches))
    merged.config = replace(merged.config, name=new_name or f"{base}-{name}")
    return merged.requires_grad_(True).eval()


@contextmanager
def activated(model: UniversalModel, name: str | None) -> Iterator[None]:
    """Activate an adapter, or none, inside `with`; afterwards the one that was active before."""
    before = model.adapters.active
    set_adapter(model, name)
    try:
        yield
    finally:
        set_adapter(model, before)


def named_adapter(model: UniversalModel, name: str | None) -> str:
    """Return the name of the adapter that is meant: the given one, or that of the active one.

    Raises:
        UsageError: There is none.
    """
    held = model.adapters
    name = held.active if name is None else name
    if name is None or name not in held.known:
        known = listed(held.names) or "none"
        raise UsageError(f"The model has no adapter {name!r}; it has {known}. Load it first.")
    return name


def details(model: UniversalModel, name: str) -> AddedClasses:
    """Return the classes of an adapter, whether it is active or not."""
    held = model.adapters
    return held.known[name].added or _cut(model, held.own_branches)


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
    """Put low-rank layers into backbone, head and the heads of the adapter's own branches.

    Args:
        model: It is changed in place.
        name: Of the adapter.
        rank: See `add_adapter`.
        alpha: See `add_adapter`.
        branches: Of the adapter's classes.
        seed: Of the start, where there are no `values`.
        values: What the layers learnt, by name.

    Raises:
        MissingExtraError: peft is not installed.
    """
    parts: dict[str, nn.Module] = {"backbone.": model.backbone, "head.": model.head}
    heads = {
        f"branches.{index}.head.": branch.head
        for index, branch in enumerate(branches)
        if isinstance(branch, Branch) and branch.head is not None
    }
    for prefix, part in {**parts, **heads}.items():
        own_rank = head_rank(rank) if prefix in heads else rank
        learnt = None if values is None else low_rank.below(values, prefix)
        low_rank.inject(part, name, own_rank, alpha * own_rank / rank, seed=seed, values=learnt)


def head_rank(rank: int) -> int:
    """Return the rank in the heads of an adapter's own classes."""
    return max(rank, HEAD_RANK)


def base_sha256(model: Model) -> str:
    """Compute the SHA-256 of a model's backbone and head without adapters.

    An adapter names its base by it. It is computed from the values in half precision: stored so,
    they are the same weights still.
    """
    digest = hashlib.sha256()
    for part in ("backbone", "head"):
        for key, value in sorted(low_rank.plain_state(model.get_submodule(part)).items()):
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.detach().half().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def default_name(classes: Sequence[str]) -> str:
    """Make a name for the adapter of some classes: "vertebra-L1", "vertebra-L1-and-4-more"."""
    first = re.sub(r"[^\w]+", "-", classes[0]).strip("-") or "adapter"
    return first if len(classes) == 1 else f"{first}-and-{len(classes) - 1}-more"


def check_name(model: UniversalModel, name: str) -> None:
    """Refuse a name that the model has an adapter of, or that no adapter can have.

    Raises:
        UsageError: See above.
    """
    if name in model.adapters.known:
        raise UsageError(f"The model has an adapter {name!r} already. Give another name.")
    if not re.fullmatch(r"[\w-]+", name):
        raise UsageError(f"{name!r} cannot name an adapter: use letters, digits, '_' and '-'.")


def check_new(model: UniversalModel, classes: Sequence[ClassSpec]) -> None:
    """Refuse classes that the model has.

    Raises:
        UsageError: See above.
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
        return model.adapters.loaded_branches
    left, own = list(classes), len(model.branches)
    while left and own:
        last = list(model.config.branches[own - 1].classes)
        if left[-len(last) :] != last:
            break
        own -= 1
        del left[-len(last) :]
    if left:
        raise UsageError(
            f"{listed(list(classes))} are not the classes that were added last, in order and group "
            f"by group. The model has {listed(list(model.classes))}."
        )
    return own


def _cut(model: UniversalModel, own: int) -> AddedClasses:
    """The model's branches from `own` on, and their classes."""
    specs = model.config.branches[own:]
    added = sum(len(spec.classes) for spec in specs if not spec.replaces)
    first = len(model.classes) - added
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
