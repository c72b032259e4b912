"""What a pretraining run depends on; together with the data it determines the weights.

A configuration is a YAML file with these fields (see `configs/` beside this module); `reading`
turns one into the other. The entries of `sources` are described beside the sources that they build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from foundation.config import check_class_name
from foundation.errors import UsageError
from foundation.settings import ByKind
from foundation.training.sample import Size, Window
from foundation.training.schedule import ScheduleConfig
from foundation.training.sources import SOURCES, SourceConfig

if TYPE_CHECKING:
    SourceEntry = SourceConfig
else:  # whatever is registered by now; reading chooses among them by `kind`
    SourceEntry = Annotated[Union[tuple(SOURCES.values())], ByKind()]  # noqa: UP007


def _require(given: bool, message: str) -> None:
    if not given:
        raise UsageError(message)


@dataclass(frozen=True)
class ClassConfig:
    """One class: a name of the taxonomy, or any other with its prompt.

    Attributes:
        name: Of the class.
        prompt: The sentence that is embedded; made from the name if empty.
        parent: A lesion's organ.
        exclusive: Whether a voxel of it belongs to no other exclusive class (see
            `losses.scan_losses`); as in the taxonomy if not given, and false for names that it does
            not have.

    Raises:
        UsageError: The name cannot be a class's.
    """

    name: str
    prompt: str = ""
    parent: str | None = None
    exclusive: bool | None = None

    def __post_init__(self) -> None:
        check_class_name(self.name, self.prompt or None)


@dataclass(frozen=True)
class ArchitectureConfig:
    """The model to train.

    Attributes:
        backbone: A name of `networks.BACKBONES`.
        backbone_options: Arguments of its class.
        text: The encoder of the prompts; "one-hot" for none, a vector a class.
        standardise_text: Whether the embeddings are spread before the network reads them.
        spare_places: Of one-hot vectors, for classes that are added to the weights later. Text
            needs none.
        classes: If empty, the taxonomy's 32, and those that only the run's datasets annotate.
        hu_windows: Low and high HU of each channel of the image.
    """

    backbone: str = "lite_unet"
    backbone_options: Mapping[str, Any] = field(default_factory=dict)
    text: Literal["clip", "minilm", "biobert", "biolinkbert", "one-hot"] = "minilm"
    standardise_text: bool = True
    spare_places: int = 0
    classes: tuple[ClassConfig, ...] = ()
    hu_windows: tuple[Window, ...] = ((-175.0, 250.0),)

    def __post_init__(self) -> None:
        _require(self.spare_places >= 0, f"spare_places is {self.spare_places}; it is 0 or more.")
        one_hot = self.text == "one-hot" or not self.spare_places
        _require(one_hot, "spare_places are of text: one-hot; text needs none.")


@dataclass(frozen=True)
class StageConfig:
    """A part of the run on one grid; stages follow each other.

    Attributes:
        steps: Optimiser steps.
        patch_size: Voxels along X, Y and Z.
        spacing_mm: Of the patch, along each axis.
        batch_size: Patches of one process in a batch.
        accumulation: Batches of a step.
        rate: Share of the schedule's learning rate.
        balance: In place of the loss's own.
        all_cases: Train on the held-out cases too, from here to the end of the run; the model as it
            was before is kept, to be measured on them.

    Raises:
        UsageError: A value is not allowed.
    """

    steps: int
    patch_size: Size = (96, 96, 96)
    spacing_mm: float = 1.5
    batch_size: int = 2
    accumulation: int = 1
    rate: float = 1.0
    balance: float | None = None
    all_cases: bool = False

    def __post_init__(self) -> None:
        counts = {"steps": self.steps, "batch_size": self.batch_size}
        for name, value in {**counts, "accumulation": self.accumulation}.items():
            _require(value > 0, f"{name} is {value}; it must be 1 or more.")
        _require(
            min(self.patch_size) > 0 and self.spacing_mm > 0,
            "patch_size and spacing_mm must be positive.",
        )
        _require(self.rate > 0, f"rate is {self.rate}; not above 0.")
        _require((self.balance or 0) >= 0, f"balance is {self.balance}; give 0 or more.")


@dataclass(frozen=True)
class OptimizerConfig:
    """The settings of AdamW.

    Attributes:
        learning_rate: The common one.
        head_learning_rate: Of the generating layers of the head; the common one if null.
        weight_decay: Of all parameters.
        betas: Of the running averages.
        layer_decay: Each stage of the backbone learns at this times the rate of the one after it.
        clip_norm: Largest norm of the gradient; null for no limit.

    Raises:
        UsageError: A value is not allowed.
    """

    learning_rate: float = 4e-4
    head_learning_rate: float | None = None
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 1.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; not above 0.")
        _require(0 < self.layer_decay <= 1, f"layer_decay is {self.layer_decay}; not in (0, 1].")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss's terms.

    Attributes:
        dice: Of Dice.
        binary: Of the binary cross-entropy.
        exclusive: Of the softmax over exclusive classes; 0 leaves the paper's pair of BCE and Dice.
        balance: How much small classes are favoured while the learning rate is high.
        auxiliary: Of the same loss on a linear classifier beside the head.
        sample_voxels: How many voxels of a patch the loss looks at; null for all.

    Raises:
        UsageError: A value is not allowed.
    """

    dice: float = 1.0
    binary: float = 1.0
    exclusive: float = 0.0
    balance: float = 0.0
    auxiliary: float = 0.0
    sample_voxels: int | None = None

    def __post_init__(self) -> None:
        weights = (self.dice, self.binary, self.exclusive, self.auxiliary, self.balance)
        _require(min(weights) >= 0, "The weights of the loss must not be negative.")
        _require(max(weights[:3]) > 0, "dice, binary and exclusive are all 0: nothing to learn.")
        _require(
            self.sample_voxels is None or self.sample_voxels > 0,
            f"sample_voxels is {self.sample_voxels}; give a number of voxels, or null for all.",
        )


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out cases.

    Attributes:
        every: Steps between validations; 0 for none.
        fold: Which of the five in `folds` is held out, 0 to 4.
        folds: A JSON file; made from the store if null.
        hold_out: Datasets, or cases such as "04/case_012", that are never trained on either.
        overlap: Of the sliding windows, in [0, 1).
        most: Cases that are looked at; null for all.

    Raises:
        UsageError: A value is not allowed.
    """

    every: int = 0
    fold: int | None = None
    folds: str | None = None
    hold_out: tuple[str, ...] = ()
    overlap: float = 0.5
    most: int | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.overlap < 1, f"overlap is {self.overlap}; give a share in [0, 1).")
        _require(self.every >= 0, f"every is {self.every}; 0 means no validation.")
        _require(self.fold is None or self.fold in range(5), f"fold is {self.fold}, not 0 to 4.")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written on the way.

    Attributes:
        every: Steps between rows of log.csv.
        tensorboard: Whether to write events for it, too.

    Raises:
        UsageError: `every` is not above 0.
    """

    every: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _require(self.every > 0, f"logging.every is {self.every}; it must be 1 or more.")


@dataclass(frozen=True)
class RunConfig:
    """A pretraining run.

    Attributes:
        name: Of the model.
        stages: One after the other.
        sources: What patches are drawn from; see `training.sources`.
        seed: Of all chance.
        model: What is trained.
        optimizer: How fast.
        schedule: The way of the learning rate.
        loss: What is minimised.
        validation: What is held out.
        logging: What is written on the way.
        ema: Decay of the running average that is published as the weights; null publishes the last
            ones.
        precision: Of the network's computation.
        weights_dtype: Of the saved models.
        channels_last: Whether channels lie together in memory.
        checkpoint_activations: Whether the backward pass computes activations anew: less memory.
        compile: Whether `torch.compile` is used.
        echo: How often each patch is used; more than once where making patches takes longer than
            learning from them.
        save_every: Steps between checkpoints.
        workers: Processes that make patches, for each process that trains.
        store: Folder made by `universal-ct prepare`.
        initialise_from: A saved folder, or a name on the hub, of the same architecture.

    Raises:
        UsageError: A value is not allowed, or two do not go together.
    """

    name: str
    stages: tuple[StageConfig, ...]
    sources: tuple[SourceEntry, ...]
    seed: int = 1
    model: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    ema: float | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    weights_dtype: Literal["float32", "float16"] = "float32"
    channels_last: bool = False
    checkpoint_activations: bool = False
    compile: bool = False
    echo: int = 1
    save_every: int = 500
    workers: int = 2
    store: str | None = None
    initialise_from: str | None = None

    def __post_init__(self) -> None:
        _require(bool(self.stages), "stages is empty; a run needs at least one.")
        _require(bool(self.sources), f"sources is empty; give one of {', '.join(SOURCES)}.")
        weights = [source.weight for source in self.sources]
        _require(min(weights) >= 0 and sum(weights) > 0, f"weights of sources are {weights}.")
        _require(self.seed >= 0, f"seed is {self.seed}; it must be 0 or more.")
        _require(self.ema is None or 0 <= self.ema < 1, f"ema is {self.ema}; not in [0, 1).")
        _require(self.echo > 0, f"echo is {self.echo}; a patch is used once or more.")
        _require(self.save_every > 0, f"save_every is {self.save_every}; it must be 1 or more.")
        whole = [stage.all_cases for stage in self.stages]
        _require(
            whole == sorted(whole) and not whole[0],
            "all_cases: what was trained on cannot be held out again, so such stages come last, "
            "after one that holds cases out.",
        )
        held_out = self.validation.fold is not None or bool(self.validation.hold_out)
        _require(
            held_out or not any(whole),
            "all_cases: nothing is held out; name it in validation.hold_out or validation.fold.",
        )
        cubic = any(source.cubic for source in self.sources)
        cubes = all(len(set(stage.patch_size)) == 1 for stage in self.stages)
        _require(cubes or not cubic, "Rendered patches are cubic: give one patch_size a stage.")

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)
