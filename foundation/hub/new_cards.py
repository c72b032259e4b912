"""Cards of weights that a user saves: written from their configuration, base and results.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from foundation.config import AdapterConfig, ClassSpec, ModelConfig, NetworkConfig
from foundation.hub.cards import Card, card_names, read_card
from foundation.taxonomy import CLASSES

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
