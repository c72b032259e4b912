"""Model cards: the front matter of a card is the only description of a published weight.

Nothing here imports torch, so that listing models is instant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from foundation.config import ClassSpec, ModelConfig, NetworkConfig
from foundation.errors import HubError, WeightsError
from foundation.taxonomy import CLASSES

PACKAGE = Path(__file__).parents[1]
# libyaml reads a card about ten times faster, but PyYAML can be built without it.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FENCE = "---"
# Licences that the Hub knows by id; any other is written as `license: other` with its name.
_HUB_LICENCES = {
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc0-1.0",
    *(f"cc-by{terms}-4.0" for terms in ("", "-sa", "-nd", "-nc", "-nc-sa", "-nc-nd")),
}
_DISCLAIMER = "Not a medical device: for research only, not for diagnosis or treatment."


@dataclass(frozen=True)
class HubFile:
    """Where published weights are: a file of a Hub repository, in the published format."""

    repo: str
    file: str


@dataclass(frozen=True)
class ModelSummary:
    """One line of `list_models`.

    classes: how many; parameters: of the network; size_mb: on this disk, None if not here.
    where: "embedded" or the Hub repository and file.
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
    """A model card: YAML front matter (`metadata`) and prose (`text`, Markdown)."""

    name: str
    metadata: Mapping[str, Any]
    text: str

    @classmethod
    def parse(cls, name: str, markdown: str, source: str) -> Card:
        """Read a card from Markdown; `source` names it in errors.

        Raises:
            WeightsError: there is no front matter, or it is not a YAML mapping.
        """
        head, fence, rest = markdown.partition(f"{_FENCE}\n")
        front, closing, text = rest.partition(f"\n{_FENCE}\n")
        if head.strip() or not fence or not closing:
            raise WeightsError(
                f"{source} has no front matter: a card starts with YAML between two lines of ---."
            )
        try:
            metadata = yaml.load(front, Loader=_LOADER)
        except yaml.YAMLError as error:
            raise WeightsError(f"The front matter of {source} is not YAML: {error}") from error
        if not isinstance(metadata, dict):
            raise WeightsError(f"The front matter of {source} is not a mapping of names to values.")
        return cls(name, metadata, text.lstrip("\n"))

    def render(self) -> str:
        """The card as Markdown; `parse` reads it back."""
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
        """Where the weights come from; None if they are embedded in the package."""
        source = self.weights.get("source")
        return HubFile(**source) if source else None

    @property
    def folder(self) -> Path:
        """Where the package keeps embedded weights of this name."""
        return PACKAGE / "weights" / self.name

    def summary(self) -> ModelSummary:
        """What `list_models` tells of these weights.

        Raises:
            WeightsError: the front matter lacks one of the fields.
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
    """The cards inside an installed package, else those of the checkout around it."""
    packaged = PACKAGE / "model_cards"
    return packaged if packaged.is_dir() else PACKAGE.parent / "model_cards"


def card_names() -> tuple[str, ...]:
    """Names of the weights that have a card, sorted; each loads with `from_pretrained`."""
    names = {path.stem for path in cards_folder().glob("*.md")}
    return tuple(sorted(names - {"README"}))  # which is about the cards


def read_card(name: str) -> Card:
    """Read the card of one of the known weights.

    Raises:
        HubError: no card has that name.
    """
    known = card_names()
    if name not in known:
        raise HubError(f"No model is called {name!r}.{did_you_mean(name, known)}")
    path = cards_folder() / f"{name}.md"
    return Card.parse(name, path.read_text(encoding="utf-8"), path.name)


def list_cards() -> tuple[Card, ...]:
    """Every card, in the order of `card_names`."""
    return tuple(read_card(name) for name in card_names())


def list_models() -> tuple[ModelSummary, ...]:
    """The weights that can be loaded by name, without downloading or importing anything heavy."""
    return tuple(card.summary() for card in list_cards())


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown name: the closest known one, and all of them."""
    close = get_close_matches(name, known, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return f"{guess} Known models: {', '.join(known)}. See: universal-ct models."


def generate_card(config: NetworkConfig, parameters: int, sha256: Mapping[str, str]) -> Card:
    """The card of a saved model that comes without one: facts only, no results.

    parameters: number of the network's parameters; sha256: file name → hexadecimal digest.
    """
    metadata: dict[str, Any] = {
        **_licence(config),
        "library_name": "universal-ct",
        "pipeline_tag": "image-segmentation",
        "tags": ["medical-imaging", "ct", "image-segmentation", "universal-ct", config.backbone],
        "metrics": ["dice"],
        "model-index": [{"name": config.name, "results": []}],
        "universal_ct": {
            "backbone": config.backbone,
            "classes": len(config.classes),
            "parameters": parameters,
            "summary": f"{config.backbone}, {len(config.classes)} classes",
        },
    }
    return Card(config.name, metadata, _generated_text(config, sha256))


def adapter_card(
    name: str,
    config: ModelConfig,
    *,
    classes: Sequence[ClassSpec],
    base_sha256: str,
    parameters: int,
    rank: int,
    sha256: Mapping[str, str],
) -> Card:
    """The card of an adapter that comes without one: what it was made for, and what it brings.

    config: of the base model. classes: that the adapter brings. base_sha256: see
    `attachment.base_sha256`. parameters, sha256: as in `generate_card`.
    """
    block = {
        "adapter_of": config.name,
        "base_sha256": base_sha256,
        "rank": rank,
        "classes": len(classes),
        "parameters": parameters,
        "summary": f"adapter of {config.name}, {len(classes)} more classes",
    }
    metadata: dict[str, Any] = {
        **_licence(config),
        "library_name": "universal-ct",
        "pipeline_tag": "image-segmentation",
        "tags": ["medical-imaging", "ct", "image-segmentation", "universal-ct", "lora"],
        "metrics": ["dice"],
        "model-index": [{"name": name, "results": []}],
        "universal_ct": block,
    }
    lines = [
        f"# {name}",
        "",
        f"A low-rank adapter (LoRA, rank {rank}) of the CT segmentation model `{config.name}`, "
        "saved by universal-ct. It fits these weights and no others; `load_adapter` checks.",
        "",
        _DISCLAIMER,
        *(["", config.licence_notice] if config.licence_notice else []),
        "",
        "## Lineage",
        "",
        f"Base model: `{config.name}`, backbone `{config.backbone}`. "
        f"SHA-256 of its weights, in half precision: `{base_sha256}`.",
        "",
        "## Classes it brings",
        "",
        *(_class_table(classes) if classes else ["None."]),
        "",
        "## SHA-256",
        "",
        *(f"- `{file}`: `{digest}`" for file, digest in sorted(sha256.items())),
        "",
        "## Results",
        "",
        "None recorded with this adapter.",
    ]
    return Card(name, metadata, "\n".join(lines) + "\n")


def _licence(config: NetworkConfig) -> dict[str, str]:
    if config.licence in _HUB_LICENCES:
        return {"license": config.licence}
    return {"license": "other", "license_name": config.licence}


def _class_table(classes: Sequence[ClassSpec]) -> list[str]:
    snomed = {known.name: known.snomed or "" for known in CLASSES}
    rows = [
        f"| {channel} | {spec.name} | {spec.prompt} | {spec.parent or ''} "
        f"| {snomed.get(spec.name, '')} |"
        for channel, spec in enumerate(classes)
    ]
    return [
        "| channel | class | prompt | part of | SNOMED CT |",
        "|-|-|-|-|-|",
        *rows,
    ]


def _generated_text(config: NetworkConfig, sha256: Mapping[str, str]) -> str:
    pre = config.preprocessing
    head, encoder = f"a head without text ({config.activation})", []
    if isinstance(config, ModelConfig):
        text, head = config.text, "the text-driven head of the CLIP-Driven Universal Model"
        head += " (arXiv 2301.00785)"
        encoder = [
            "",
            "## Text encoder",
            "",
            f"`{text.encoder}`, revision `{text.revision or 'not recorded'}`, pooling "
            f"{text.pooling}, {'unit length' if text.normalised else 'not normalised'}, "
            f"{text.dim} dimensions. Template: `{text.template}`.",
        ]
    windows = "; ".join(f"{low:g} to {high:g} HU" for low, high in pre.hu_windows)
    lines = [
        f"# {config.name}",
        "",
        f"CT segmentation: backbone `{config.backbone}` and {head}, saved by universal-ct.",
        "",
        _DISCLAIMER,
        *(["", config.licence_notice] if config.licence_notice else []),
        "",
        "## Classes",
        "",
        *_class_table(config.classes),
        *encoder,
        "",
        "## Preprocessing",
        "",
        f"Orientation {pre.orientation}, spacing {_by(pre.spacing_mm)} mm, window {windows}, "
        f"patch {_by(pre.patch_size)} voxels, overlap {pre.overlap:g}, "
        f"threshold {pre.threshold:g}.",
        "",
        "## SHA-256",
        "",
        *(f"- `{name}`: `{digest}`" for name, digest in sorted(sha256.items())),
        "",
        "## Results",
        "",
        "None recorded with these weights.",
    ]
    return "\n".join(lines) + "\n"


def _by(sizes: Sequence[float]) -> str:
    return " × ".join(f"{size:g}" for size in sizes)
