"""Model cards: the front matter of a card is the only description of a published weight.

Nothing here imports torch, so that listing models is instant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from foundation.config import AdapterConfig, ClassSpec, ModelConfig, NetworkConfig
from foundation.errors import HubError, WeightsError
from foundation.files import read_text
from foundation.settings import check_yaml, did_you_mean
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
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nd-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0",
}
_DISCLAIMER = "Not a medical device: for research only, not for diagnosis or treatment."


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


@dataclass(frozen=True)
class Results:
    """Dice measured with a model or an adapter, as its card reports it; in [0, 1], class → mean.

    Attributes:
        dataset: Name of the scans.
        split: Which of them: "test" or "validation".
        scans: How many.
        dice: Against labels.
        surface_dice: Against the same labels.
        tolerance_mm: Of the surface Dice.
        agreement: Dice with masks that a machine made, which measures no accuracy.
        agreement_with: What made these masks.
    """

    dataset: str
    split: str
    scans: int
    dice: Mapping[str, float] = field(default_factory=dict)
    surface_dice: Mapping[str, float] = field(default_factory=dict)
    tolerance_mm: float | None = None
    agreement: Mapping[str, float] = field(default_factory=dict)
    agreement_with: str = "the base model"

    def index(self) -> list[dict[str, Any]]:
        """Return the results of a `model-index`, as the Hub reads them."""
        metrics = [
            {"type": kind, "name": f"{title}, {name}", "value": round(value, 4)}
            for kind, title, values in (
                ("dice", "Dice", self.dice),
                ("surface-dice", "Surface Dice", self.surface_dice),
                ("dice", "Dice agreement", self.agreement),
            )
            for name, value in values.items()
        ]
        dataset = {"type": self.dataset, "name": self.dataset, "split": self.split}
        task = {"type": "image-segmentation"}
        return [{"task": task, "dataset": dataset, "metrics": metrics}] if metrics else []

    def lines(self) -> list[str]:
        """Return the lines of its section of the card's text."""
        lines = [f"{self.dataset}: {self.scans} {self.split} scans."]
        if self.surface_dice:
            lines.append(f"Surface Dice with a tolerance of {self.tolerance_mm:g} mm.")
        if self.dice:
            lines += ["", "| class | Dice | surface Dice |", "|-|-|-|"]
            surface = {name: f"{value:.3f}" for name, value in self.surface_dice.items()}
            lines += [
                f"| {name} | {value:.3f} | {surface.get(name, '')} |"
                for name, value in self.dice.items()
            ]
        if self.agreement:
            made = (
                f"Masks of classes that the scans do not label, compared with those of "
                f"{self.agreement_with}. This is agreement, not accuracy."
            )
            lines += ["", made, "", "| class | Dice agreement |", "|-|-|"]
            lines += [f"| {name} | {value:.3f} |" for name, value in self.agreement.items()]
        return lines


@dataclass(frozen=True)
class Base:
    """The model that another one, or an adapter, was made from.

    Attributes:
        name: Of the model.
        source: What `from_pretrained` loads it by; empty if it is only in a folder.
        sha256: See `adapting.adapters.base_sha256`.
    """

    name: str
    source: str
    sha256: str

    def front_matter(self, relation: str) -> dict[str, str]:
        """Return the lines by which the Hub shows the lineage.

        Args:
            relation: Of the new weights to this model: "finetune" or "adapter".

        Returns:
            Keys and values; none for a model that the Hub cannot know.
        """
        known = read_card(self.source).source if self.source in card_names() else None
        repository = known.repo if known else self.source.partition("@")[0]
        return {"base_model": repository, "base_model_relation": relation} if repository else {}

    def lines(self) -> list[str]:
        """Return the lines of its section of the card's text."""
        where = f", from `{self.source}`" if self.source not in ("", self.name) else ""
        only = "" if self.source else " It was loaded from a folder: ask who trained it for it."
        return [
            f"Base model: `{self.name}`{where}. SHA-256 of its backbone and head, in half "
            f"precision: `{self.sha256}`.{only}"
        ]


def generate_card(
    config: NetworkConfig,
    parameters: int,
    sha256: Mapping[str, str],
    *,
    base: Base | None = None,
    results: Results | None = None,
    notes: str = "",
) -> Card:
    """Write the card of a saved model that comes without one: facts, and the given results.

    Args:
        config: Of the model.
        parameters: Number of the network's parameters.
        sha256: File name → hexadecimal digest.
        base: The model that this one was made from, if it is known.
        results: What was measured.
        notes: Further sections, Markdown.
    """
    block = {
        "backbone": config.backbone,
        "classes": len(config.classes),
        "parameters": parameters,
        "summary": f"{config.backbone}, {len(config.classes)} classes",
    }
    if base is not None:
        block["base"] = asdict(base)
    head = (
        "the text-driven head of the CLIP-Driven Universal Model (arXiv 2301.00785)"
        if isinstance(config, ModelConfig)
        else f"a head without text ({config.activation})"
    )
    first = f"CT segmentation: backbone `{config.backbone}` and {head}, saved by universal-ct."
    sections = {"Classes": _class_table(config.classes), **_input_sections(config)}
    return _card(config.name, first, config, block, sections, sha256, base, results, notes)


def adapter_card(
    adapter: AdapterConfig,
    config: NetworkConfig,
    parameters: int,
    sha256: Mapping[str, str],
    *,
    results: Results | None = None,
    notes: str = "",
) -> Card:
    """Write the card of an adapter that comes without one: its base, and what it brings.

    Args:
        adapter: What its folder says.
        config: Of the base model.
        parameters: Number of the adapter's values.
        sha256: File name → hexadecimal digest.
        results: What was measured with it.
        notes: Further sections, Markdown.
    """
    base = Base(adapter.base, adapter.base_source, adapter.base_sha256)
    first = (
        f"A low-rank adapter (LoRA, rank {adapter.rank}) of the CT segmentation model "
        f"`{base.name}`, saved by universal-ct. It fits these weights and no others. "
        "`from_pretrained` loads it with its base; `load_adapter` puts it on a model."
    )
    block = {
        "adapter_of": base.name,
        "base_sha256": base.sha256,
        "rank": adapter.rank,
        "classes": len(adapter.classes),
        "parameters": parameters,
        "summary": f"adapter of {base.name}, {len(adapter.classes)} more classes",
    }
    sections = {
        "Classes it brings": _class_table(adapter.classes) if adapter.classes else ["None."]
    }
    return _card(
        adapter.name, first, config, block, sections, sha256, base, results, notes, "adapter"
    )


def _card(
    name: str,
    first: str,
    config: NetworkConfig,
    block: Mapping[str, Any],
    sections: Mapping[str, Sequence[str]],
    sha256: Mapping[str, str],
    base: Base | None,
    results: Results | None,
    notes: str,
    relation: str = "finetune",
) -> Card:
    kind = "lora" if relation == "adapter" else config.backbone
    metadata: dict[str, Any] = {
        **_licence(config, base),
        **(base.front_matter(relation) if base else {}),
        "library_name": "universal-ct",
        "pipeline_tag": "image-segmentation",
        "tags": ["medical-imaging", "ct", "image-segmentation", "universal-ct", kind],
        "metrics": ["dice"],
        "model-index": [{"name": name, "results": results.index() if results else []}],
        "universal_ct": dict(block),
    }
    if base:
        licence = [
            f"The weights of the base are under {config.licence}. The scans and labels that were "
            "trained on may add terms, which universal-ct cannot know: whoever publishes this "
            "states them here and in `license` above."
        ]
        sections = {"Licence": licence, "Lineage": base.lines(), **sections}
    files = [f"- `{file}`: `{digest}`" for file, digest in sorted(sha256.items())]
    nothing = ["None recorded."]
    sections = {**sections, "SHA-256": files, "Results": results.lines() if results else nothing}
    lines = [f"# {name}", "", first, "", _DISCLAIMER]
    lines += ["", config.licence_notice] if config.licence_notice else []
    for title, content in sections.items():
        lines += ["", f"## {title}", "", *content]
    text = "\n".join(lines) + "\n"
    return Card(name, metadata, f"{text}\n{notes.strip()}\n" if notes else text)


def _licence(config: NetworkConfig, base: Base | None) -> dict[str, str]:
    """The licence's lines of the front matter.

    What was trained further is never said to be under the base's licence alone: the data may have
    terms of its own.
    """
    if base is None and config.licence in _HUB_LICENCES:
        return {"license": config.licence}
    name = config.licence if base is None else f"{config.licence}-and-that-of-the-data"
    return {"license": "other", "license_name": name}


def _class_table(classes: Sequence[ClassSpec]) -> list[str]:
    snomed = {known.name: known.snomed or "" for known in CLASSES}
    rows = ["| channel | class | prompt | part of | SNOMED CT |", "|-|-|-|-|-|"]
    return rows + [
        f"| {channel} | {spec.name} | {spec.prompt} | {spec.parent or ''} "
        f"| {snomed.get(spec.name, '')} |"
        for channel, spec in enumerate(classes)
    ]


def _input_sections(config: NetworkConfig) -> dict[str, list[str]]:
    pre, sections = config.preprocessing, {}
    windows = "; ".join(f"{low:g} to {high:g} HU" for low, high in pre.hu_windows)
    if isinstance(config, ModelConfig):
        text = config.text
        sections["Text encoder"] = [
            f"`{text.encoder}`, revision `{text.revision or 'not recorded'}`, pooling "
            f"{text.pooling}, {'unit length' if text.normalised else 'not normalised'}, "
            f"{text.dim} dimensions. Template: `{text.template}`."
        ]
    reading = (
        f"Orientation {pre.orientation}, spacing {_by(pre.spacing_mm)} mm, window {windows}, "
        f"patch {_by(pre.patch_size)} voxels, overlap {pre.overlap:g}, "
        f"threshold {pre.threshold:g}."
    )
    return {**sections, "Preprocessing": [reading]}


def _by(sizes: Sequence[float]) -> str:
    return " × ".join(f"{size:g}" for size in sizes)
