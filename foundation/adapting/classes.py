"""Add classes to a model by embedding their prompts with the text encoder of its weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from foundation.adapting import low_rank
from foundation.config import (
    BranchKind,
    BranchSpec,
    ClassSpec,
    ModelConfig,
    TextSpec,
    check_class_name,
)
from foundation.errors import UsageError
from foundation.networks.branches import Branch
from foundation.networks.protocol import require
from foundation.taxonomy import PAIRED, normalise, resolve
from foundation.text import ONE_HOT, check_compatible, class_prompt, encode_prompts

if TYPE_CHECKING:
    from foundation.model import UniversalModel

logger = logging.getLogger(__name__)
# Measured with the embedded weights on one CT, 17 untrained prompts: the five whose nearest class
# has a cosine of 0.69 or more agree with its mask (Dice 0.54 to 0.96); those of 0.61 or less do not
# (at most 0.06).
_NEAR = 0.65


@dataclass(frozen=True)
class Neighbour:
    """A class of the model that is near to another one in text.

    Attributes:
        name: Of the class.
        cosine: Of its prompt's embedding with the other one's, both centred; in [-1, 1].
    """

    name: str
    cosine: float


@dataclass(frozen=True, repr=False)
class Expectation:
    """What is to be expected of a new class before any training; shown as a sentence.

    Attributes:
        name: Of the new class.
        neighbours: The classes known before, nearest in text first.
    """

    name: str
    neighbours: tuple[Neighbour, ...]

    @property
    def note(self) -> str:
        """The sentence of `zero_shot_note`."""
        return zero_shot_note(self.name, self.neighbours)

    def __repr__(self) -> str:
        return self.note


def add_class(
    model: UniversalModel,
    name: str,
    *,
    prompt: str | None = None,
    parent: str | None = None,
    embedding: Tensor | None = None,
    text: TextSpec | None = None,
    kind: BranchKind = "prompt",
) -> Expectation:
    """Give `model` a further class, known by its prompt alone, as its last channel.

    A term of the prompt bank needs no encoder; any other prompt is encoded by the weights' own.
    No weight changes, and the logits of the other classes stay as they are, bit for bit. What a
    network makes of a prompt that it was not trained with is a guess, which is returned: the known
    classes nearest in text, and what that predicts. Fine-tune it.

    Args:
        model: It is changed in place.
        name: Of the class. It is kept as it is, also where it is another name of a class that the
            model has (a warning says so).
        prompt: The sentence; made from `name` by the weights' template if not given.
        parent: The organ that a lesion lies in: a class of the model.
        embedding: (D,), your own embedding of `prompt`.
        text: What made `embedding`; it must be what made the weights' own embeddings.
        kind: What the class has of its own, see `BranchSpec`.

    Returns:
        What to expect of the class before training.

    Raises:
        UsageError: The name is empty or the model has that class; `parent` is no class of it;
            `embedding` comes without `text` or has another shape, or another encoder, revision,
            template, pooling or normalisation made it.
        MissingExtraError: As `foundation.text.encode_prompts`, where the encoder is needed.
        HubError: As `foundation.text.encode_prompts`.
        WeightsError: As `foundation.text.encode_prompts`.
    """
    if embedding is not None and text is None:
        raise UsageError("Give in `text` which encoder made the embedding, and how: a TextSpec.")
    if text is not None:
        check_compatible(model.config.text, text)
    check_class_name(name, prompt)
    sentence = class_prompt(name, model.config.text) if prompt is None else prompt
    rows = None if embedding is None else embedding[None]
    spec = ClassSpec(name, sentence, parent)
    (expected,) = add_classes(model, [spec], kind=kind, embeddings=rows)
    return expected


def add_classes(
    model: UniversalModel,
    specs: Sequence[ClassSpec],
    *,
    kind: BranchKind = "prompt",
    width: int = 16,
    embeddings: Tensor | None = None,
) -> tuple[Expectation, ...]:
    """Give `model` further classes that share what `kind` gives them of their own: one branch.

    A head of their own starts as a copy of the model's, so that they begin as a prompt alone would.

    Args:
        model: It is changed in place.
        specs: Names, prompts and parents; a parent is a class of the model or one of these.
        kind: What the classes have of their own, see `BranchSpec`.
        width: Of the side decoder, in channels.
        embeddings: (k, D), of the prompts, by the weights' own encoder; made here if not given.

    Returns:
        What to expect of each class before training, by the classes that the model had.

    Raises:
        UsageError: There is no class, or one without a name, or one that the model has; a parent is
            no class; the embeddings have another shape; or the model knows its classes by one-hot
            vectors and has no place left.
        MissingExtraError: As `add_class`.
        HubError: As `add_class`.
        WeightsError: As `add_class`.
    """
    require(model, "logits", "Adding a class by its prompt")
    config = model.config
    _check_new(config, specs)
    specs = [_with_parent(config, spec, specs) for spec in specs]
    if embeddings is None and config.text.encoder == ONE_HOT:
        embeddings = _free_places(model, len(specs))
    elif embeddings is None:
        embeddings = encode_prompts(config.text, [spec.prompt for spec in specs])
    if tuple(embeddings.shape) != (len(specs), config.text.dim):
        raise UsageError(
            f"The embedding has shape {tuple(embeddings.shape[1:])}; the weights need one vector "
            f"of {config.text.dim} for each of the {len(specs)} classes."
        )
    expected = tuple(
        Expectation(spec.name, nearest_classes(model, row))
        for spec, row in zip(specs, embeddings, strict=True)
    )
    added = BranchSpec(tuple(spec.name for spec in specs), kind, width)
    grown = replace(config, classes=(*config.classes, *specs), branches=(*config.branches, added))
    rows = model.prompt_embedding
    _append_branch(model, added, grown)
    model.prompt_embedding = torch.cat([rows, embeddings.to(rows)])
    return expected


def replace_classes(model: UniversalModel, names: Sequence[str], *, width: int = 16) -> None:
    """Let a new branch compute classes that the model has, in the place of what did so before.

    Names, channels, prompts and the logits of the other classes stay as they are. The branch starts
    as a copy of the branch that computed these classes, or of the model's head.

    Args:
        model: It is changed in place.
        names: Classes of the model.
        width: Of the side decoder, in channels, where the branch starts from the head.

    Raises:
        UsageError: The model does not have one of the classes.
    """
    config = model.config
    if unknown := [name for name in names if name not in config.class_names]:
        raise UsageError(f"The model has no class {unknown[0]!r}, which a branch should compute.")
    before = [
        (spec, branch)
        for spec, branch in zip(config.branches, model.branches, strict=True)
        if spec.kind == "side" and set(names) <= set(spec.classes)
    ]
    spec = BranchSpec(tuple(names), "side", before[-1][0].width if before else width, True)
    branch = _append_branch(model, spec, replace(config, branches=(*config.branches, spec)))
    if before:
        state = low_rank.plain_state(before[-1][1])
        own = [before[-1][0].classes.index(name) for name in names]
        plain = {key: value[own] for key, value in state.items() if key.startswith("plain.")}
        branch.load_state_dict({**state, **plain})


def _append_branch(model: UniversalModel, spec: BranchSpec, grown: ModelConfig) -> Branch:
    """A branch whose head starts as a copy of the model's."""
    branch, rows = Branch(spec, model.backbone, grown), model.prompt_embedding
    if branch.head is not None:
        branch.head.load_state_dict(low_rank.plain_state(model.head))
    branch.to(rows.device, rows.dtype).train(model.training)
    model.config = grown
    model.branches.append(branch)
    return branch


def nearest_classes(
    model: UniversalModel, prompt: str | Tensor, count: int = 3
) -> tuple[Neighbour, ...]:
    """Find the model's classes whose prompts are nearest to `prompt`, nearest first.

    Prompts of one template lie close together, so they are centred first: as `standardise_text`
    does, or on the mean of the model's own.

    Args:
        model: Of the classes.
        prompt: A sentence, or its embedding (D,).
        count: How many classes at most.

    Raises:
        MissingExtraError: As `add_class`.
        HubError: As `add_class`.
        WeightsError: As `add_class`.
    """
    config, rows = model.config, model.prompt_embedding.float()
    given = encode_prompts(config.text, [prompt])[0] if isinstance(prompt, str) else prompt
    centre = model.head.text_shift if model.head.standardise_text else rows.mean(0)
    cosines = functional.cosine_similarity(rows - centre, given.to(rows)[None] - centre, dim=1)
    order = cosines.argsort(descending=True, stable=True)[:count]
    return tuple(Neighbour(config.class_names[int(i)], float(cosines[i])) for i in order)


def _check_new(config: ModelConfig, specs: Sequence[ClassSpec]) -> None:
    """Refuse names that are empty or taken; warn of other names of classes that the model has.

    Raises:
        UsageError: see above.
    """
    known = {normalise(name): name for name in config.class_names}
    for spec in specs:
        check_class_name(spec.name, spec.prompt)
        if same := known.get(normalise(spec.name)):
            raise UsageError(f"The model has a class {same!r} already. Give another name.")
        known[normalise(spec.name)] = spec.name
        with suppress(UsageError):
            alias = resolve(spec.name, config.class_names)
            logger.warning(
                "%s is another name of %s, a class that the model has. It is added as a class of "
                "its own.",
                spec.name,
                alias,
            )


def _free_places(model: UniversalModel, count: int) -> Tensor:
    """One-hot vectors (count, D) of places that no class of the model has.

    Raises:
        UsageError: There are fewer.
    """
    free = (~model.prompt_embedding.bool().any(0)).nonzero()[:, 0]
    if len(free) < count:
        raise UsageError(
            f"{model.config.name} knows its classes by one-hot vectors, with {len(free)} places "
            f"left for {count} more. Take weights that read text, or train with "
            f"model.spare_places={count} or more."
        )
    places = torch.zeros(count, model.config.text.dim)
    places[torch.arange(count), free[:count].cpu()] = 1
    return places


def _with_parent(config: ModelConfig, spec: ClassSpec, specs: Sequence[ClassSpec]) -> ClassSpec:
    """`spec` with the own name of its parent, which may be given by another one.

    Raises:
        UsageError: it is no class of the model, and none of `specs`.
    """
    names = [name for name in (*config.class_names, *(s.name for s in specs)) if name != spec.name]
    if spec.parent is None or set(names) & set(PAIRED.get(spec.parent, ())):
        return spec
    try:
        return replace(spec, parent=resolve(spec.parent, names))
    except UsageError as error:
        raise UsageError(
            f"The parent of {spec.name!r} must be a class of the model, or one that is added with "
            f"it. {error}"
        ) from error


def zero_shot_note(name: str, neighbours: Sequence[Neighbour]) -> str:
    """Say in a sentence what the nearest known classes predict of a new one before any training.

    Args:
        name: Of the new class.
        neighbours: Known classes, nearest first.
    """
    listed = ", ".join(f"{each.name} ({each.cosine:.2f})" for each in neighbours)
    if not neighbours:
        return f"{name}: the model has no class to compare with."
    nearest = neighbours[0]
    expected = "none is near: untrained, it may be nothing, another organ or half of the body"
    if nearest.cosine >= _NEAR:
        expected = f"untrained, it will be segmented much as {nearest.name} is"
    return f"{name}: nearest in text {listed}; {expected}."
