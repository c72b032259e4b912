"""More classes for a model: more prompts, embedded exactly as the weights' own were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from foundation.adapting import low_rank as lora
from foundation.config import BranchSpec, ClassSpec, TextSpec, check_class_name
from foundation.errors import UsageError
from foundation.inference.sliding_window import Network
from foundation.networks.branches import Branch
from foundation.taxonomy import normalise
from foundation.text import check_compatible, class_prompt, encode_prompts

Kind = Literal["prompt", "head", "side"]
# Measured with the embedded weights on one CT, 17 untrained prompts: the five whose nearest class
# has a cosine of 0.69 or more agree with its mask (Dice 0.54 to 0.96); those of 0.61 or less do not
# (at most 0.06).
_NEAR = 0.65


@dataclass(frozen=True)
class Neighbour:
    """A known class, and the cosine of its prompt with another, both centred; in [-1, 1]."""

    name: str
    cosine: float


@dataclass(frozen=True, repr=False)
class Expectation:
    """What is to be expected of a new class before any training; shown as a sentence.

    name: the new class. neighbours: the classes known before, nearest in text first.
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
    model: Network,
    name: str,
    *,
    prompt: str | None = None,
    parent: str | None = None,
    embedding: Tensor | None = None,
    text: TextSpec | None = None,
    kind: Kind = "prompt",
) -> Expectation:
    """Give `model` a further class, known by its prompt alone, as its last channel.

    A term of the prompt bank needs no encoder; any other prompt is encoded by the weights' own.
    No weight changes, and the logits of the other classes stay as they are, bit for bit. What a
    network makes of a prompt that it was not trained with is a guess, which is returned: the known
    classes nearest in text, and what that predicts. Fine-tune it.

    prompt: the sentence; made from `name` by the weights' template if not given.
    parent: the organ that a lesion lies in. embedding (D,), text: your own embedding of `prompt`,
    and what made it, which must be what made the weights' embeddings. kind: see `BranchSpec`.

    Raises:
        UsageError: the model has that class; `embedding` comes without `text` or has another shape,
            or another encoder, revision, template, pooling or normalisation made it.
        MissingExtraError, HubError, WeightsError: the encoder is needed and cannot be used; see
            `foundation.text.encode_prompts`.
    """
    if embedding is not None and text is None:
        raise UsageError("Say by `text` which encoder made the embedding, and how: a TextSpec.")
    if text is not None:
        check_compatible(model.config.text, text)
    sentence = class_prompt(name, model.config.text) if prompt is None else prompt
    rows = None if embedding is None else embedding[None]
    spec = ClassSpec(name, sentence, parent)
    (expected,) = add_classes(model, [spec], kind=kind, embeddings=rows)
    return expected


def add_classes(
    model: Network,
    specs: Sequence[ClassSpec],
    *,
    kind: Kind = "prompt",
    width: int = 16,
    embeddings: Tensor | None = None,
) -> tuple[Expectation, ...]:
    """Give `model` further classes that share what `kind` gives them of their own: one branch.

    A head of their own starts as a copy of the model's, so that they begin as a prompt alone would.
    Returns what to expect of each before training, by the classes that the model had.
    embeddings (k, D): of the prompts, by the weights' own encoder; made here if not given.
    width: of the side decoder. Otherwise as `add_class`.

    Raises:
        UsageError: no class, one that the model has, or embeddings of another shape.
        MissingExtraError, HubError, WeightsError: as `add_class`.
    """
    config = model.config
    known = {normalise(name): name for name in config.class_names}
    for spec in specs:
        check_class_name(spec.name, spec.prompt)
        if same := known.get(normalise(spec.name)):
            raise UsageError(f"The model has a class {same!r} already. Give another name.")
        known[normalise(spec.name)] = spec.name
    if embeddings is None:
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
    branch = Branch(added, model.backbone, grown)
    if branch.head is not None:
        branch.head.load_state_dict(lora.plain_state(model.head))
    branch.to(rows.device, rows.dtype).train(model.training)
    model.config = grown
    model.branches.append(branch)
    model.prompt_embedding = torch.cat([rows, embeddings.to(rows)])
    return expected


def nearest_classes(model: Network, prompt: str | Tensor, count: int = 3) -> tuple[Neighbour, ...]:
    """The model's classes whose prompts are nearest to `prompt`, nearest first.

    prompt: a sentence, or its embedding (D,). Prompts of one template lie close together, so they
    are centred first: as `standardise_text` does, or on the mean of the model's own.

    Raises:
        MissingExtraError, HubError, WeightsError: as `add_class`.
    """
    config, rows = model.config, model.prompt_embedding.float()
    given = encode_prompts(config.text, [prompt])[0] if isinstance(prompt, str) else prompt
    centre = model.head.text_shift if model.head.standardise_text else rows.mean(0)
    cosines = functional.cosine_similarity(rows - centre, given.to(rows)[None] - centre, dim=1)
    order = cosines.argsort(descending=True, stable=True)[:count]
    return tuple(Neighbour(config.class_names[int(i)], float(cosines[i])) for i in order)


def zero_shot_note(name: str, neighbours: Sequence[Neighbour]) -> str:
    """What the nearest known classes predict of a new one before any training, in a sentence."""
    listed = ", ".join(f"{each.name} ({each.cosine:.2f})" for each in neighbours)
    if not neighbours:
        return f"{name}: the model has no class to compare with."
    nearest = neighbours[0]
    if nearest.cosine >= _NEAR:
        says = f"untrained, it will be segmented much as {nearest.name} is"
    else:
        says = "none is near: untrained, it may be nothing, another organ or half of the body"
    return f"{name}: nearest in text {listed}; {says}."
