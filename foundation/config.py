"""What travels with the weights: architecture, classes, text encoder and preprocessing.

Everything here is plain data that reads from and writes to `config.json`; nothing imports torch.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from foundation.errors import UsageError, WeightsError, listed
from foundation.settings import read
from foundation.taxonomy import NAMES, PAIRED

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT_VERSION = 1
ADAPTER_VERSION = 1
Triple = tuple[float, float, float]
Activation = Literal["sigmoid", "softmax"]
BranchKind = Literal["prompt", "head", "side"]
# A configuration may come from anybody. What no network needs is refused before it costs memory or
# time: a window of a billion voxels, an overlap at which a CT takes years.
SPACING_LIMITS_MM = (0.1, 50.0)
MOST_PATCH = 4096  # voxels along an axis; a window is never larger than the CT
MOST_OVERLAP = 0.9  # a voxel is then computed a thousand times
MOST_HU = 1e6
MOST_CHANNELS = 64
MOST_CLASSES = 10_000
MOST_BRANCHES = 256
MOST_WIDTH = 8192  # of any whole number among a backbone's options, and of a branch
MOST_OPTIONS = 1000  # values in a backbone's options; DiNTS' paths are 120
MOST_DIVISOR = 1024
MOST_TEXT_DIM = 65_536
MOST_RANK = 4096
MOST_ALPHA = 1e6
_MOST_NAME = 200  # signs
_MOST_ANCESTORS = 8  # of a class; a longer line of parents is a circle
_AXIS_OF = {"R": "x", "L": "x", "A": "y", "P": "y", "S": "z", "I": "z"}
_Spec = TypeVar("_Spec")


@dataclass(frozen=True)
class Preprocessing:
    """How a CT becomes the network's input, and logits become masks.

    Each pair of `hu_windows` gives one input channel: HU are clipped to [low, high]. They are then
    scaled to [0, 1]; where `hu_mean_std` is given, its mean is subtracted instead, and the result
    divided by its standard deviation.

    Attributes:
        orientation: Where the three axes of the input point, as NIfTI axis codes. "RAS" is to the
            right, to the front, upwards.
        spacing_mm: Size of a voxel along these axes.
        hu_windows: (low, high) of each channel, in HU.
        hu_mean_std: (mean, standard deviation) of each channel, in HU, or nothing.
        patch_size: Voxels of the sliding window along these axes.
        overlap: Share of a patch that its neighbour covers too.
        threshold: A voxel belongs to a class where its probability exceeds this.
    """

    orientation: str = "RAS"
    spacing_mm: Triple = (1.5, 1.5, 1.5)
    hu_windows: tuple[tuple[float, float], ...] = ((-175.0, 250.0),)
    hu_mean_std: tuple[tuple[float, float], ...] = ()
    patch_size: tuple[int, int, int] = (96, 96, 96)
    overlap: float = 0.5
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if sorted(_AXIS_OF.get(code, "") for code in str(self.orientation)) != ["x", "y", "z"]:
            raise UsageError(
                f"orientation is {self.orientation!r}; give three letters, one of each pair R or "
                "L, A or P, S or I: RAS, LPS, SPL."
            )
        _check_channels(self.hu_windows, self.hu_mean_std)
        low, high = SPACING_LIMITS_MM
        if not _are_numbers(self.spacing_mm, 3) or not all(
            low <= size <= high for size in self.spacing_mm
        ):
            raise UsageError(
                f"spacing_mm is {self.spacing_mm}; give three numbers from {low:g} to {high:g} mm, "
                "one of each axis."
            )
        if not _are_numbers(self.patch_size, 3, int) or not all(
            1 <= size <= MOST_PATCH for size in self.patch_size
        ):
            raise UsageError(
                f"patch_size is {self.patch_size}; give three whole numbers of voxels from 1 to "
                f"{MOST_PATCH}."
            )
        check_overlap(self.overlap)
        if not _are_numbers((self.threshold,), 1) or not 0 < self.threshold < 1:
            raise UsageError(f"threshold is {self.threshold}; give a number between 0 and 1.")

    @property
    def channels(self) -> int:
        """Number of input channels, one for each HU window."""
        return len(self.hu_windows)


def check_overlap(overlap: float) -> None:
    """Refuse an overlap of windows at which a CT would take for ever.

    Args:
        overlap: Share of a window that its neighbour covers.

    Raises:
        UsageError: It is no number from 0 to `MOST_OVERLAP`.
    """
    if not _are_numbers((overlap,), 1) or not 0 <= overlap <= MOST_OVERLAP:
        raise UsageError(
            f"overlap is {overlap!r}; give a share from 0 to {MOST_OVERLAP:g}, e.g. 0.5: windows "
            "share that much with their neighbours."
        )


def _check_channels(windows: Sequence[Any], mean_std: Sequence[Any]) -> None:
    """Refuse HU windows, or means and deviations, by which no channel can be computed."""
    if (
        not 1 <= len(windows) <= MOST_CHANNELS
        or not all(_are_numbers(pair, 2) for pair in windows)
        or not all(-MOST_HU <= low < high <= MOST_HU for low, high in windows)
    ):
        raise UsageError(
            f"hu_windows is {windows!r:.200}; give 1 to {MOST_CHANNELS} pairs (low, high) of HU, "
            f"low < high, within ±{MOST_HU:g}."
        )
    if mean_std and (
        len(mean_std) != len(windows)
        or not all(_are_numbers(pair, 2) for pair in mean_std)
        or not all(
            abs(mean) <= MOST_HU and 0 < deviation <= MOST_HU for mean, deviation in mean_std
        )
    ):
        raise UsageError(
            f"hu_mean_std is {mean_std!r:.200}; give (mean, deviation) in HU, a pair "
            f"for each of the {len(windows)} HU windows, with a deviation above 0."
        )


def _are_numbers(values: Any, count: int, kind: type = float) -> bool:
    """Whether these are so many finite numbers; with `int`, whole ones."""
    allowed = (int,) if kind is int else (int, float)
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(
            isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)
            for value in values
        )
    )


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
    if len(name) > _MOST_NAME:
        raise UsageError(
            f"A class needs a name of at most {_MOST_NAME} signs; {name!r:.80} is longer."
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
        if twice := _twice(self.classes):
            raise UsageError(f"A branch has the class {listed(twice)} twice; once is enough.")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What inference, evaluation and export need to know of a network.

    Attributes:
        name: Name of the network.
        classes: The classes in channel order, without background.
        preprocessing: How a CT becomes its input.
        activation: "sigmoid": one channel a class, and classes may overlap. "softmax": channel 0
            is background, the classes follow, and each voxel belongs to one of them.
        divisor: Every spatial size of a patch must be a multiple of this. A `Model` takes it from
            its backbone.
        backbone: Name of a registered backbone; "" for a network that is not built by name.
        backbone_options: Further arguments of the backbone.
        licence: SPDX id, or the name under which the licence is known.
        licence_notice: Shown when the network is loaded.
    """

    name: str
    classes: tuple[ClassSpec, ...]
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    activation: Activation = "sigmoid"
    divisor: int = 1
    backbone: str = ""
    backbone_options: Mapping[str, Any] = field(default_factory=dict)
    licence: str = "apache-2.0"
    licence_notice: str = ""

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise UsageError(f"activation is {self.activation!r}; choose softmax or sigmoid.")
        if not 1 <= self.divisor <= MOST_DIVISOR:
            raise UsageError(f"divisor is {self.divisor}; it must be 1 to {MOST_DIVISOR}.")
        for what in ("name", "backbone", "licence"):
            text = getattr(self, what)
            if len(text) > _MOST_NAME or not text.isprintable():
                raise UsageError(
                    f"{what} is {text!r:.80}; give a line of at most {_MOST_NAME} signs."
                )
        if not self.name.strip():
            raise UsageError("name is empty; a network needs one.")
        if not 1 <= len(self.classes) <= MOST_CLASSES:
            raise UsageError(
                f"There are {len(self.classes)} classes; a network has 1 to {MOST_CLASSES}."
            )
        if twice := _twice(self.class_names):
            raise UsageError(f"Two classes are called {listed(twice)}; each needs its own name.")
        _check_parents(self.classes)
        _check_options(self.backbone_options)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in channel order."""
        return tuple(spec.name for spec in self.classes)

    def to_json(self) -> str:
        """Return the text of a `config.json`, which `from_json` reads."""
        content = {name: value for name, value in asdict(self).items() if value != ()}
        return json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "config.json") -> Self:
        """Read a configuration strictly.

        Args:
            text: The content of a `config.json`.
            source: Its path, for errors.

        Raises:
            WeightsError: It is not JSON, has an unknown or missing field, a value that is not
                allowed, or another format version.
        """
        return _read_model(cls, _json(text, source), source)


def _twice(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _check_parents(classes: Sequence[ClassSpec]) -> None:
    """Refuse a parent that is no class; a model of few classes may lack an organ of the 32."""
    parents = {spec.name: spec.parent for spec in classes}
    for name, parent in parents.items():
        if parent is None:
            continue
        if parent not in parents and parent not in NAMES and parent not in PAIRED:
            raise UsageError(
                f"The parent of {name!r} is {parent!r}, which is no class of the model and none of "
                "the 32. Give one that is, or none."
            )
        above: str | None = parent
        for _ in range(_MOST_ANCESTORS):
            above = parents.get(above) if above is not None else None
        if above is not None:
            raise UsageError(f"The parents of {name!r} have no end; give it the organ it lies in.")


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse a backbone's options that could not be a network's, before one is built of them."""
    left: list[Any] = [options]
    seen = 0
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, int) and abs(value) > MOST_WIDTH:
            raise UsageError(
                f"backbone_options hold {value!r:.40}; whole numbers are at most {MOST_WIDTH}."
            )
        elif isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"backbone_options hold {value!r}; numbers are finite.")
        seen += 1
        if seen + len(left) > MOST_OPTIONS:
            raise UsageError(
                f"backbone_options hold more than {MOST_OPTIONS} values; no backbone has as many."
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig(NetworkConfig):
    """Everything needed to build a text-driven model around its weights.

    Attributes:
        text: The encoder of the prompts.
        standardise_text: Subtract a stored mean from prompt embeddings and scale them; see
            `foundation.networks.head`.
        branches: One entry for each group of added classes. Together they list the last of
            `classes`, in order.
    """

    backbone: str = field()  # here it must be given
    text: TextSpec = field(default_factory=TextSpec)
    standardise_text: bool = False
    branches: tuple[BranchSpec, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation != "sigmoid":
            raise UsageError("A text-driven model has the activation sigmoid: classes may overlap.")
        if len(self.branches) > MOST_BRANCHES:
            raise UsageError(
                f"There are {len(self.branches)} branches; a model has at most {MOST_BRANCHES}."
            )
        added = [name for branch in self.branches if not branch.replaces for name in branch.classes]
        if list(self.class_names[len(self.classes) - len(added) :]) != added:
            raise UsageError(f"The branches' classes {added} are not the last of the model's.")
        replaced = {name for branch in self.branches if branch.replaces for name in branch.classes}
        if unknown := sorted(replaced - set(self.class_names)):
            raise UsageError(f"A branch computes {unknown}, which the model does not have.")


def read_config(text: str, source: str = "config.json") -> NetworkConfig:
    """Read the configuration of a text-driven model, or of a network without text.

    Args:
        text: The content of a `config.json`.
        source: Its path, for errors.

    Raises:
        WeightsError: See `NetworkConfig.from_json`.
    """
    raw = _json(text, source)
    kind = ModelConfig if isinstance(raw, dict) and "text" in raw else NetworkConfig
    return _read_model(kind, raw, source)


def _read_model(kind: type[_Spec], raw: Any, source: str) -> _Spec:
    where = f"{source} does not describe a model"
    config = read(kind, raw, where, version=FORMAT_VERSION, error=WeightsError)
    if isinstance(config, ModelConfig) and any("prompt" not in item for item in raw["classes"]):
        raise WeightsError(f"{where}: the key 'prompt' of a class is missing.")
    return config


def _json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of too many digits or brackets, too
        raise WeightsError(f"{source} is not valid JSON: {error}.") from error


@dataclass(frozen=True)
class Origin:
    """Where a model was loaded from.

    Attributes:
        name: Of the model as it was saved.
        source: By which anybody can load it: a name of `list_models()`, or `org/name` or
            `org/name@revision` on the Hub. Empty for a folder or a file.
        path: The folder or file on this machine.
        weights_sha256: SHA-256 of the file of the weights, where the folder names it.
    """

    name: str
    source: str = ""
    path: str = ""
    weights_sha256: str | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's folder says about it, in two files.

    adapter_config.json is peft's own and holds rank, alpha and the names of the changed layers;
    universal_ct.json holds the rest.

    Attributes:
        name: Of the adapter.
        base: Name of the model that it was made for.
        base_source: What `from_pretrained` loads the base by; empty if it was only in a folder.
        base_folder: That folder, relative to the adapter's; never in an adapter that was pushed.
        base_sha256: See `adapting.adapters.base_sha256`.
        rank: See `adapting.adapters.add_adapter`.
        alpha: See `adapting.adapters.add_adapter`.
        target_modules: Regular expression of the names of the base's layers that it changes.
        classes: That it brings.
        branches: Of these classes.
        text: The encoder that made the embeddings of their prompts.
    """

    name: str
    base: str
    base_source: str
    base_folder: str
    base_sha256: str
    rank: int
    alpha: float
    target_modules: str
    classes: tuple[ClassSpec, ...]
    branches: tuple[BranchSpec, ...]
    text: TextSpec

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MOST_RANK:
            raise UsageError(f"r (the rank) is {self.rank}; it must be 1 to {MOST_RANK}.")
        if not abs(self.alpha) <= MOST_ALPHA:
            raise UsageError(f"lora_alpha is {self.alpha}; it must lie within ±{MOST_ALPHA:g}.")
        if len(self.branches) > MOST_BRANCHES:
            raise UsageError(
                f"There are {len(self.branches)} branches; an adapter has at most {MOST_BRANCHES}."
            )
        names = [spec.name for spec in self.classes]
        if twice := _twice(names):
            raise UsageError(f"Two classes are called {listed(twice)}; each needs its own name.")
        added = [name for branch in self.branches if not branch.replaces for name in branch.classes]
        if added != names:
            raise UsageError(f"The branches' classes {added} are not the adapter's, {names}.")

    def to_json(self) -> str:
        """Return the text of universal_ct.json."""
        content = asdict(self)
        for name in ("rank", "alpha", "target_modules"):  # peft's file holds these
            del content[name]
        return json.dumps({"format_version": ADAPTER_VERSION, **content}, indent=2) + "\n"

    def to_peft(self) -> str:
        """Return the text of adapter_config.json."""
        source, _, revision = self.base_source.partition("@")
        content = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": source or self.base,
            "revision": revision or None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": self.target_modules,
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, ours: str, pefts: str, source: str) -> AdapterConfig:
        """Read the texts of an adapter's two files strictly.

        Args:
            ours: Of universal_ct.json.
            pefts: Of adapter_config.json.
            source: Their folder, for errors.

        Raises:
            WeightsError: They are not what this version writes, or do not belong together.
        """
        raw, layers = _json(ours, source), _json(pefts, source)
        where = f"{source} does not describe an adapter"
        if isinstance(raw, dict) and isinstance(layers, dict):
            known = {"rank": "r", "alpha": "lora_alpha", "target_modules": "target_modules"}
            raw |= {name: layers[theirs] for name, theirs in known.items() if theirs in layers}
        config = read(cls, raw, where, version=ADAPTER_VERSION, error=WeightsError)
        if json.loads(config.to_peft()) != layers:
            raise WeightsError(
                f"{where}: universal_ct.json and adapter_config.json do not belong together."
            )
        return config
