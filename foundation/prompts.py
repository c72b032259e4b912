"""One more class for a model: one more prompt, embedded exactly as the weights' own were."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foundation.config import ClassSpec, TextSpec
from foundation.errors import UsageError
from foundation.model import UniversalModel
from foundation.taxonomy import normalise
from foundation.text import check_compatible, class_prompt, encode_prompts


def add_class(
    model: UniversalModel,
    name: str,
    *,
    prompt: str | None = None,
    parent: str | None = None,
    embedding: Tensor | None = None,
    text: TextSpec | None = None,
) -> None:
    """Give `model` a further class, known by its prompt alone, as its last channel.

    A term of the prompt bank needs no encoder; any other prompt is encoded by the weights' own.
    What a network makes of a prompt that it was not trained with is untested: fine-tune it.

    prompt: the sentence; made from `name` by the weights' template if not given.
    parent: the organ that a lesion lies in. embedding (D,), text: your own embedding of `prompt`,
    and what made it, which must be what made the weights' embeddings.

    Raises:
        UsageError: the model has that class; `embedding` comes without `text` or has another shape,
            or another encoder, revision, template, pooling or normalisation made it.
        MissingExtraError, HubError, WeightsError: the encoder is needed and cannot be used; see
            `foundation.text.encode_prompts`.
    """
    config = model.config
    same = [known for known in model.classes if normalise(known) == normalise(name)]
    if same:
        raise UsageError(f"The model has a class {same[0]!r} already. Give another name.")
    sentence = class_prompt(name, config.text) if prompt is None else prompt
    if embedding is None:
        embedding = encode_prompts(config.text, [sentence])[0]
    elif text is None:
        raise UsageError("Say by `text` which encoder made the embedding, and how: a TextSpec.")
    else:
        check_compatible(config.text, text)
    if tuple(embedding.shape) != (config.text.dim,):
        raise UsageError(
            f"The embedding has shape {tuple(embedding.shape)}; the weights need one vector of "
            f"{config.text.dim}."
        )
    rows = model.prompt_embedding
    model.config = replace(config, classes=(*config.classes, ClassSpec(name, sentence, parent)))
    model.prompt_embedding = torch.cat([rows, embedding[None].to(rows)])
