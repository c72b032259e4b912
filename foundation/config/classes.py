"""Classes, the sentences that name them, and the branches that compute added ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from foundation.config.limits import MOST_NAME, MOST_TEXT_DIM, MOST_WIDTH, doubled
from foundation.errors import UsageError, listed

BranchKind = Literal["prompt", "head", "side"]

# The paper's templates; V3 is its best, and the one the published embeddings were made with.
PROMPT_TEMPLATES: dict[str, str] = {
    "V1": "A photo of a {}.",
    "V3": "A computerized tomography of a {}",
}


def make_prompt(name: str, template: str = "V3") -> str:
    """Make the sentence for a class name.

    Args:
        name: What the sentence is of, in words.
        template: "V1", "V3", or your own with one `{}`.

    Returns:
        The sentence.

    Raises:
        UsageError: The template does not hold exactly one `{}`.
    """
    sentence = PROMPT_TEMPLATES.get(template, template)
    if sentence.count("{}") != 1:
        raise UsageError(
            f"Prompt template {template!r} must contain '{{}}' exactly once, where the class name "
            f"goes, or be one of {', '.join(PROMPT_TEMPLATES)}; e.g. {PROMPT_TEMPLATES['V3']!r}."
        )
    return sentence.replace("{}", name)


def check_class_name(name: str, prompt: str | None = None) -> None:
    """Refuse a class whose name or prompt says nothing.

    Args:
        name: Of the class; it becomes part of files' names and of reports.
        prompt: Its sentence; None where it is made from the name.

    Raises:
        UsageError: One of them has no letter or digit, or the name has a line break.
    """
    for what, text in (("name", name), ("prompt", prompt)):
        if not isinstance(text, str | None):
            raise UsageError(f"A class needs a {what} that is text; {text!r:.80} is none.")
        if text is not None and not re.search(r"\w", text):
            raise UsageError(f"A class needs a {what} with a letter or digit; {text!r} has none.")
    if not name.isprintable():
        raise UsageError(f"A class needs a name without line breaks or tabs; {name!r} has some.")
    if len(name) > MOST_NAME:
        raise UsageError(
            f"A class needs a name of at most {MOST_NAME} signs; {name!r:.80} is longer."
        )


@dataclass(frozen=True)
class TextSpec:
    """Which text encoder made the prompt embeddings, and how: embeddings of two never mix.

    Attributes:
        encoder: `open_clip:<model>/<pretrained>` or `hf:<Hugging Face id>`.
        revision: The encoder's revision or the SHA-256 of its weights; "" where it is not known.
        template: The prompt with `{}` for the class name.
        pooling: `eot` (CLIP's end-of-text token), `mean` or `cls`.
        normalised: Whether embeddings have unit length.
        dim: Length of an embedding.
    """

    encoder: str = "open_clip:ViT-B-32/openai"
    revision: str = ""
    template: str = PROMPT_TEMPLATES["V3"]
    pooling: str = "eot"
    normalised: bool = False
    dim: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.dim <= MOST_TEXT_DIM:
            raise UsageError(
                f"dim is {self.dim}; the length of a prompt embedding is 1 to {MOST_TEXT_DIM}."
            )


@dataclass(frozen=True)
class ClassSpec:
    """One class.

    Attributes:
        name: Its name.
        prompt: The exact sentence that was embedded; "" in a network without text.
        parent: Name of the organ that it lies in, for a lesion.
    """

    name: str
    prompt: str = ""
    parent: str | None = None

    def __post_init__(self) -> None:
        check_class_name(self.name)  # a class of a plain head has no prompt
        if self.parent is not None and self.parent == self.name:
            raise UsageError(f"The parent of {self.name!r} is the class itself; give its organ.")


@dataclass(frozen=True)
class BranchSpec:
    """Classes that were added to trained weights together, and the layers that only they use.

    Attributes:
        classes: Their names.
        kind: `prompt`, no layers; `head`, a text-driven head; `side`, a head and a small decoder
            over the encoder's features. See `foundation.networks.branches`.
        width: Channels of that decoder.
        replaces: The classes are others of the model, and are computed by this branch in the place
            of what computed them before.
    """

    classes: tuple[str, ...]
    kind: BranchKind = "prompt"
    width: int = 16
    replaces: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(BranchKind):
            raise UsageError(f"A branch is of kind {self.kind!r}; choose prompt, head or side.")
        if not self.classes or not 1 <= self.width <= MOST_WIDTH:
            raise UsageError(
                f"A branch needs at least one class, and a width of 1 to {MOST_WIDTH}; its width "
                f"is {self.width}."
            )
        if twice := doubled(self.classes):
            raise UsageError(f"A branch has the class {listed(twice)} twice; once is enough.")
