"""What travels with the weights: architecture, classes, text encoder and preprocessing.

Everything here is plain data that reads from and writes to `config.json`; nothing imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar, cast

from foundation.errors import UsageError, WeightsError

FORMAT_VERSION = 1
ADAPTER_VERSION = 1
Triple = tuple[float, float, float]
_Spec = TypeVar("_Spec")


@dataclass(frozen=True)
class Preprocessing:
    """How a CT becomes the network's input, and logits become masks.

    hu_windows: each (low, high) pair clips HU and scales it to [0, 1]; one input channel each.
    patch_size: voxels of the sliding window, X Y Z, at `spacing_mm`.
    overlap: fraction of the patch shared by neighbouring windows.
    threshold: a voxel belongs to a class where its probability exceeds this.
    """

    orientation: str = "RAS"
    spacing_mm: Triple = (1.5, 1.5, 1.5)
    hu_windows: tuple[tuple[float, float], ...] = ((-175.0, 250.0),)
    patch_size: tuple[int, int, int] = (96, 96, 96)
    overlap: float = 0.5
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.orientation != "RAS":
            raise UsageError(f"orientation is {self.orientation!r}; only 'RAS' is supported.")
        if not self.hu_windows or any(low >= high for low, high in self.hu_windows):
            raise UsageError(
                f"hu_windows is {self.hu_windows}; give (low, high) pairs, low < high."
            )
        if min(self.spacing_mm) <= 0 or min(self.patch_size) <= 0:
            raise UsageError("spacing_mm and patch_size must be positive.")
        if not 0 <= self.overlap < 1 or not 0 < self.threshold < 1:
            raise UsageError("overlap must lie in [0, 1) and threshold in (0, 1).")


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
        if text is not None and not re.search(r"\w", text):
            raise UsageError(f"The {what} of a class is {text!r}; give one with a letter or digit.")
    if not name.isprintable():
        raise UsageError(f"The name of a class is {name!r}; give one without line breaks or tabs.")


@dataclass(frozen=True)
class TextSpec:
    """Which text encoder made the prompt embeddings, and how: embeddings of two never mix.

    encoder: `open_clip:<model>/<pretrained>` or `hf:<Hugging Face id>`.
    revision: the encoder's revision or the SHA-256 of its weights; "" where it is not known.
    template: the prompt with `{}` for the class name.
    pooling: `eot` (CLIP's end-of-text token) or `mean`.
    normalised: whether embeddings have unit length.
    """

    encoder: str = "open_clip:ViT-B-32/openai"
    revision: str = ""
    template: str = PROMPT_TEMPLATES["V3"]
    pooling: str = "eot"
    normalised: bool = False
    dim: int = 512


@dataclass(frozen=True)
class ClassSpec:
    """One class: its name, the exact sentence that was embedded, and its parent organ's name."""

    name: str
    prompt: str
    parent: str | None = None

    def __post_init__(self) -> None:
        check_class_name(self.name)  # a class of a plain head has no prompt


@dataclass(frozen=True)
class BranchSpec:
    """Classes that were added to the weights together, and what they have of their own.

    kind: `prompt`, nothing but their prompts; `head`, a text-driven head; `side`, that and a small
    decoder of `width` channels over the encoder's features. See `foundation.networks.branches`.
    """

    classes: tuple[str, ...]
    kind: Literal["prompt", "head", "side"] = "prompt"
    width: int = 16

    def __post_init__(self) -> None:
        if self.kind not in ("prompt", "head", "side"):
            raise UsageError(f"A branch is of kind {self.kind!r}; choose prompt, head or side.")
        if not self.classes or self.width < 1:
            raise UsageError("A branch needs at least one class, and a width of 1 or more.")


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to rebuild a model around its weights.

    branches: the last of `classes`, in order, in the groups in which they were added.
    standardise_text: subtract a stored mean from prompt embeddings and scale them (see `head`).
    licence: SPDX id, or the name under which the licence is known; licence_notice: shown on load.
    """

    name: str
    backbone: str
    classes: tuple[ClassSpec, ...]
    backbone_options: Mapping[str, Any] = field(default_factory=dict)
    text: TextSpec = field(default_factory=TextSpec)
    standardise_text: bool = False
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    licence: str = "apache-2.0"
    licence_notice: str = ""
    branches: tuple[BranchSpec, ...] = ()

    def __post_init__(self) -> None:
        added = [name for branch in self.branches for name in branch.classes]
        if list(self.class_names[len(self.classes) - len(added) :]) != added:
            raise UsageError(f"The branches' classes {added} are not the last of the model's.")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in channel order."""
        return tuple(spec.name for spec in self.classes)

    def to_json(self) -> str:
        """What `from_json` reads: the text of a `config.json`."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        if not self.branches:
            del content["branches"]  # versions that do not know branches read these weights too
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "config.json") -> ModelConfig:
        """Read a configuration strictly.

        Raises:
            WeightsError: not JSON, an unknown or missing field, a value that is not allowed, or
                another format version.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise WeightsError(f"{source} is not valid JSON: {error}.") from error
        if not isinstance(raw, dict) or raw.pop("format_version", None) != FORMAT_VERSION:
            raise WeightsError(
                f"{source} is not a universal-ct configuration of format version {FORMAT_VERSION}. "
                "Update universal-ct, or convert the model again."
            )
        try:
            raw["classes"] = tuple(_strict(ClassSpec, item) for item in raw["classes"])
            raw["text"] = _strict(TextSpec, raw["text"])
            raw["branches"] = tuple(
                _strict(BranchSpec, _tuples(item)) for item in raw.get("branches", ())
            )
            raw["preprocessing"] = _strict(Preprocessing, _tuples(raw["preprocessing"]))
            return _strict(cls, raw)
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{source} does not describe a model: {error}.") from error


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter.json says.

    base, base_sha256: the model that it was made for, see `attachment.base_sha256`.
    rank, alpha: see `attachment.add_adapter`. classes, branches: that it brings. text: the encoder
    that made their prompts' embeddings.
    """

    name: str
    base: str
    base_sha256: str
    rank: int
    alpha: float
    classes: tuple[ClassSpec, ...]
    branches: tuple[BranchSpec, ...]
    text: TextSpec

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps({"format_version": ADAPTER_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> AdapterConfig:
        """Read adapter.json strictly.

        Raises:
            WeightsError: it is not what this version writes.
        """
        try:
            raw = json.loads(text)
            if raw.pop("format_version") != ADAPTER_VERSION:
                raise ValueError("another format version; update universal-ct")
            raw["classes"] = tuple(_strict(ClassSpec, item) for item in raw["classes"])
            raw["branches"] = tuple(_strict(BranchSpec, _tuples(item)) for item in raw["branches"])
            raw["text"] = _strict(TextSpec, raw["text"])
            return _strict(cls, raw)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WeightsError(f"{source} does not describe an adapter: {error}.") from error


def _strict(kind: type[_Spec], values: Mapping[str, Any]) -> _Spec:
    """Build a dataclass from fields by name, none of which may be unknown or missing."""
    unknown = set(values) - {f.name for f in fields(cast(Any, kind))}
    if unknown:
        raise TypeError(f"unknown field {sorted(unknown)} in {kind.__name__}")
    return kind(**values)


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
