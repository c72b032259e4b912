"""What a folder of weights says about the network in it: its config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from foundation.config.classes import BranchSpec, ClassSpec, TextSpec
from foundation.config.limits import (
    MOST_BRANCHES,
    MOST_CLASSES,
    MOST_DIVISOR,
    MOST_NAME,
    MOST_OPTIONS,
    MOST_WIDTH,
    doubled,
    parsed,
)
from foundation.config.preprocessing import Preprocessing
from foundation.errors import UsageError, WeightsError, listed
from foundation.settings import read
from foundation.taxonomy import NAMES, PAIRED

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT_VERSION = 1
Activation = Literal["sigmoid", "softmax"]
_MOST_ANCESTORS = 8  # of a class; a longer line of parents is a circle
_Spec = TypeVar("_Spec")


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
            if len(text) > MOST_NAME or not text.isprintable():
                raise UsageError(
                    f"{what} is {text!r:.80}; give a line of at most {MOST_NAME} signs."
                )
        if not self.name.strip():
            raise UsageError("name is empty; a network needs one.")
        if not 1 <= len(self.classes) <= MOST_CLASSES:
            raise UsageError(
                f"There are {len(self.classes)} classes; a network has 1 to {MOST_CLASSES}."
            )
        if twice := doubled(self.class_names):
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
        return _read_model(cls, parsed(text, source), source)


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
    raw = parsed(text, source)
    kind = ModelConfig if isinstance(raw, dict) and "text" in raw else NetworkConfig
    return _read_model(kind, raw, source)


def _read_model(kind: type[_Spec], raw: Any, source: str) -> _Spec:
    where = f"{source} does not describe a model"
    config = read(kind, raw, where, version=FORMAT_VERSION, error=WeightsError)
    if isinstance(config, ModelConfig) and any("prompt" not in item for item in raw["classes"]):
        raise WeightsError(f"{where}: the key 'prompt' of a class is missing.")
    return config


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
