"""Model cards: the front matter of a card is the only description of a published weight.

Nothing here imports torch, so that listing models is instant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from foundation.errors import HubError, WeightsError
from foundation.files import read_text
from foundation.settings import check_yaml, did_you_mean

PACKAGE = Path(__file__).parents[1]
# libyaml reads a card about ten times faster, but PyYAML can be built without it.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FENCE = "---"


@dataclass(frozen=True)
class HubFile:
    """Where published weights are: a file of a Hub repository, in the published format.

    Attributes:
        repo: `org/name`.
        file: Name of the file.
    """

    repo: str
    file: str


@dataclass(frozen=True)
class ModelSummary:
    """One line of `list_models`.

    Attributes:
        name: What `from_pretrained` loads the weights by.
        summary: What they are, in a sentence.
        backbone: Name of the backbone.
        classes: How many classes there are.
        parameters: How many parameters the network has.
        licence: SPDX id, or the name under which the licence is known.
        where: "embedded", or the Hub's repository and file.
        size_mb: Size on this disk in megabytes; None where they are not here.
    """

    name: str
    summary: str
    backbone: str
    classes: int
    parameters: int
    licence: str
    where: str
    size_mb: float | None


@dataclass(frozen=True)
class Card:
    """A model card: YAML front matter and prose.

    Attributes:
        name: Of the model or adapter.
        metadata: The front matter.
        text: The prose, in Markdown.
    """

    name: str
    metadata: Mapping[str, Any]
    text: str

    @classmethod
    def parse(cls, name: str, markdown: str, source: str) -> Card:
        """Read a card from Markdown.

        Args:
            name: Of the model or adapter.
            markdown: The text.
            source: Its path, for errors.

        Raises:
            WeightsError: There is no front matter, or it is not a YAML mapping of names to values,
                or aliases blow it up (see `check_yaml`).
        """
        head, fence, rest = markdown.partition(f"{_FENCE}\n")
        front, closing, text = rest.partition(f"\n{_FENCE}\n")
        if head.strip() or not fence or not closing:
            raise WeightsError(
                f"{source} has no front matter: a card starts with YAML between two lines of ---."
            )
        try:
            check_yaml(front)
            metadata = yaml.load(front, Loader=_LOADER)
        except (yaml.YAMLError, ValueError) as error:  # a date that is none, a number too long
            raise WeightsError(f"The front matter of {source} is not YAML: {error}") from error
        if not isinstance(metadata, dict) or not _has_names(metadata):
            raise WeightsError(f"The front matter of {source} is not a mapping of names to values.")
        return cls(name, metadata, text.lstrip("\n"))

    @classmethod
    def read(cls, name: str, path: Path) -> Card:
        """Read the file of a card.

        Args:
            name: Of the model or adapter.
            path: The Markdown file.

        Raises:
            WeightsError: As `parse`.
        """
        return cls.parse(name, read_text(path, error=WeightsError), str(path))

    def render(self) -> str:
        """Write the card as Markdown; `parse` reads it back."""
        front = yaml.safe_dump(
            dict(self.metadata), sort_keys=False, allow_unicode=True, default_flow_style=False
        )
        return f"{_FENCE}\n{front}{_FENCE}\n\n{self.text}"

    @property
    def licence(self) -> str:
        """The licence's id, or its name where the Hub has no id for it."""
        licence = str(self.metadata.get("license", ""))
        return str(self.metadata.get("license_name", licence)) if licence == "other" else licence

    @property
    def weights(self) -> Mapping[str, Any]:
        """Our own block of the front matter: backbone, classes, parameters, source, summary."""
        block = self.metadata.get("universal_ct", {})
        return block if isinstance(block, dict) else {}

    @property
    def source(self) -> HubFile | None:
        """Where the weights come from; None if they are embedded in the package.

        Raises:
            WeightsError: The card says it otherwise than as repo and file.
        """
        source = self.weights.get("source")
        if not source:
            return None
        known = isinstance(source, dict) and set(source) == {"repo", "file"}
        if not known or not all(isinstance(value, str) for value in source.values()):
            raise WeightsError(
                f"The card of {self.name!r} gives as source {source!r:.80}; expected are repo and "
                "file, both text."
            )
        return HubFile(**source)

    @property
    def folder(self) -> Path:
        """Where the package keeps embedded weights of this name."""
        return PACKAGE / "weights" / self.name

    def summary(self) -> ModelSummary:
        """Describe these weights for `list_models`.

        Raises:
            WeightsError: The front matter lacks one of the fields.
        """
        source = self.source
        present = source is None and self.folder.is_dir()
        size = sum(f.stat().st_size for f in self.folder.iterdir()) / 1e6 if present else None
        try:
            return ModelSummary(
                name=self.name,
                summary=self.weights["summary"],
                backbone=self.weights["backbone"],
                classes=self.weights["classes"],
                parameters=self.weights["parameters"],
                licence=self.licence,
                where=f"{source.repo}: {source.file}" if source else "embedded",
                size_mb=None if size is None else round(size, 1),
            )
        except KeyError as error:
            raise WeightsError(
                f"The card of {self.name!r} has no field {error} in its universal_ct block."
            ) from error


def cards_folder() -> Path:
    """Return the folder of the cards: in an installed package, else in the checkout around it."""
    packaged = PACKAGE / "model_cards"
    return packaged if packaged.is_dir() else PACKAGE.parent / "model_cards"


def card_names() -> tuple[str, ...]:
    """Return the names of the weights that have a card, sorted; `from_pretrained` loads each."""
    names = {path.stem for path in cards_folder().glob("*.md")}
    return tuple(sorted(names - {"README"}))  # which is about the cards


def read_card(name: str) -> Card:
    """Read the card of one of the known weights.

    Raises:
        HubError: No card has that name.
    """
    known = card_names()
    if name not in known:
        raise HubError(f"No model is called {name!r}.{known_models(name, known)}")
    return Card.read(name, cards_folder() / f"{name}.md")


def list_models() -> tuple[ModelSummary, ...]:
    """Describe the weights that load by name; nothing is downloaded, nothing heavy imported."""
    return tuple(read_card(name).summary() for name in card_names())


def known_models(name: str, known: Sequence[str]) -> str:
    """Word the end of an error about an unknown name: the closest known one, and all of them."""
    return (
        f"{did_you_mean(name, known)} Known models: {', '.join(known)}. See: universal-ct models."
    )


def _has_names(value: Any) -> bool:
    """Whether the keys of all mappings are text, as JSON has them."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _has_names(each) for key, each in value.items())
    return not isinstance(value, list) or all(_has_names(each) for each in value)
