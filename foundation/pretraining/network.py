"""The model of a run before training, what is trained beside it, and the optimiser of both."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from foundation.config import ClassSpec, ModelConfig, Preprocessing, TextSpec
from foundation.errors import UsageError
from foundation.hub.load import from_pretrained
from foundation.model import UniversalModel, check_state, weights_of
from foundation.networks.backbones import Backbone
from foundation.networks.encoder import check_patch
from foundation.networks.protocol import require
from foundation.pretraining.config import ClassConfig, OptimizerConfig, RunConfig
from foundation.taxonomy import CLASSES, NAMES
from foundation.text import (
    ONE_HOT,
    TEXT_ENCODERS,
    check_compatible,
    class_prompt,
    embed_classes,
    load_bank,
    load_encoder,
    mean_and_scale,
)
from foundation.training.depth import checkpoint_activations, rate_factors
from foundation.training.losses import EXCLUSIVE

if TYPE_CHECKING:  # a run without a store needs no blosc2
    from foundation.data.store.arrays import Store


class TrainingNetwork(nn.Module):
    """The model and, for training only, a linear classifier beside its text-driven head.

    The backbone learns from the classifier at once, and the head's generated layers find features
    that are worth it.
    """

    def __init__(self, model: UniversalModel, auxiliary: bool) -> None:
        super().__init__()
        self.model = model
        self.auxiliary: nn.Conv1d | None = None
        if auxiliary:
            self.auxiliary = nn.Conv1d(model.backbone.full_channels, len(model.classes), 1)
            nn.init.constant_(self.auxiliary.get_parameter("bias"), -2.0)

    def forward(self, image: Tensor, voxels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the logits of head and classifier at some voxels.

        Args:
            image: (B, C, X, Y, Z), preprocessed.
            voxels: Flat indices (B, M); with one for every voxel, they must be in order.

        Returns:
            Logits (B, K, M) of the head, and of the classifier if there is one.
        """
        if self.auxiliary is None and voxels.shape[1] == image[0, 0].numel():
            logits: Tensor = self.model(image)
            return logits.flatten(2), None
        logits, features = self.model.logits_at(image, voxels)
        return logits, None if self.auxiliary is None else self.auxiliary(features)


def with_own_classes(config: RunConfig, store: Store | None) -> RunConfig:
    """Add the classes that only the store has, where the configuration names no classes.

    Args:
        config: Of a run.
        store: Its store, if it has one.

    Returns:
        The configuration. Where the run's datasets annotate classes that are not among the 32,
        `model.classes` has the 32 and then those, with the prompts of the datasets' descriptions.
    """
    if store is None or config.model.classes:
        return config
    # A source without this field draws from no store; without ids, from all of its datasets.
    given = [s.datasets for s in config.sources if hasattr(s, "datasets")]
    chosen = () if () in given else tuple(name for names in given for name in names)
    if not given or not (own := store.own_classes(chosen)):
        return config
    classes = [ClassConfig(name) for name in NAMES]
    classes += [ClassConfig(name, prompt) for name, prompt in own.items()]
    return replace(config, model=replace(config.model, classes=tuple(classes)))


def class_configs(config: RunConfig) -> tuple[ClassConfig, ...]:
    """Return the classes of a run: those it names, or the taxonomy's."""
    return config.model.classes or tuple(ClassConfig(name) for name in NAMES)


def exclusive_classes(config: RunConfig) -> Tensor:
    """Return of which classes a voxel has at most one, bool (K,)."""
    known = dict(zip(NAMES, EXCLUSIVE.tolist(), strict=True))
    return torch.tensor(
        [
            known.get(each.name, False) if each.exclusive is None else each.exclusive
            for each in class_configs(config)
        ]
    )


def text_spec(config: RunConfig) -> TextSpec:
    """Return the encoder that embeds the prompts, with the revision found on this machine.

    Raises:
        HubError, MissingExtraError: Its weights cannot be had here.
    """
    if config.model.text == ONE_HOT:
        width = len(class_configs(config)) + config.model.spare_places
        return TextSpec(ONE_HOT, template="{}", pooling="none", normalised=True, dim=width)
    spec = TEXT_ENCODERS[config.model.text]
    return spec if spec.revision else load_encoder(spec).spec


def build_model(config: RunConfig) -> UniversalModel:
    """Return the untrained model of a run, which depends on its configuration and seed alone.

    Raises:
        HubError, MissingExtraError: The text encoder's weights cannot be had here.
        UsageError: The backbone does not take its options or a patch, or a class is named twice.
    """
    text = text_spec(config)
    classes = tuple(_class_spec(each, text) for each in class_configs(config))
    if len({each.name for each in classes}) < len(classes):
        raise UsageError("model.classes names a class twice; each needs a name of its own.")
    last = config.stages[-1]
    model_config = ModelConfig(
        name=config.name,
        backbone=config.model.backbone,
        backbone_options=config.model.backbone_options,
        classes=classes,
        text=text,
        standardise_text=config.model.standardise_text,
        preprocessing=Preprocessing(
            spacing_mm=(last.spacing_mm,) * 3,
            hu_windows=config.model.hu_windows,
            patch_size=last.patch_size,
        ),
    )
    embedding = (
        torch.eye(len(classes), text.dim)
        if text.encoder == ONE_HOT
        else embed_classes([each.prompt for each in classes], text)
    )
    # All of the weights' chance is in here; whoever calls keeps its own.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = UniversalModel(model_config, embedding)
    if config.model.standardise_text:
        # The bank's spread is the better measure, but it exists for one encoder only.
        bank = load_bank()
        mean, scale = mean_and_scale(bank.embeddings if text == bank.spec else embedding)
        model.head.text_shift.copy_(mean)
        model.head.text_scale.fill_(scale)
    for stage in config.stages:
        check_patch(stage.patch_size, model.backbone, config.model.backbone)
    return model


def _class_spec(given: ClassConfig, text: TextSpec) -> ClassSpec:
    known = {c.name: c for c in CLASSES}.get(given.name)
    parent = given.parent or (known.parent if known else None)
    prompt = given.prompt or class_prompt(known.term if known else given.name, text)
    return ClassSpec(given.name, prompt, parent)


def initialise(model: UniversalModel, name_or_path: str) -> None:
    """Give `model` the weights of another of the same architecture.

    Raises:
        HubError: There is no such model.
        UsageError: Its prompts were embedded by another encoder.
        WeightsError: Its keys or shapes differ; lists them.
    """
    start = from_pretrained(name_or_path)
    require(start, "logits", "Starting a pretraining")
    check_compatible(start.config.text, model.config.text)
    own, given = weights_of(model), weights_of(start)
    check_state({key: tuple(tensor.shape) for key, tensor in own.items()}, given, name_or_path)
    model.load_state_dict(given, strict=False)  # its classes are those of the run


def build_network(config: RunConfig) -> TrainingNetwork:
    """Return what a run trains, at its start.

    Raises:
        HubError, MissingExtraError, UsageError, WeightsError: As `build_model`, `initialise`.
    """
    model = build_model(config)
    if config.initialise_from:
        initialise(model, config.initialise_from)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        network = TrainingNetwork(model, auxiliary=config.loss.auxiliary > 0)
    if config.checkpoint_activations:
        checkpoint_activations(model.backbone)
    if config.channels_last:
        network.to(memory_format=torch.channels_last_3d)
    return network


def learning_rates(network: TrainingNetwork, config: OptimizerConfig) -> dict[str, float]:
    """Return the full learning rate of each parameter, by name.

    The layers of the head that generate others have the head's rate: they are the ones that a high
    rate throws off. What reads the features has the common rate, the backbone its share of it.
    """
    model = network.model
    backbone: Backbone = model.backbone
    channels = len(model.config.preprocessing.hu_windows)
    factors = rate_factors(backbone, channels, config.layer_decay)
    head_rate = config.head_learning_rate or config.learning_rate
    rates = {}
    for name, _ in network.named_parameters():
        rate = config.learning_rate
        if name.startswith("model.backbone."):
            rate *= factors[name.removeprefix("model.backbone.")]
        elif name.startswith("model.head.") and ".feature_projection." not in name:
            rate = head_rate
        rates[name] = rate
    return rates
