"""A model from its configuration and its weights, which must fit each other exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from foundation.config import ModelConfig, NetworkConfig
from foundation.errors import UsageError, WeightsError, listed

if TYPE_CHECKING:
    pass

from foundation.model.base import Model
from foundation.model.plain import PlainModel
from foundation.model.universal import PROMPTS, UniversalModel


def build_model(
    config: NetworkConfig, state: Mapping[str, Tensor], prompt_embedding: Tensor | None, source: str
) -> Model:
    """Build the model of `config` with exactly the given weights, in evaluation mode.

    Args:
        config: A `ModelConfig` for a text-driven model; without text it has a plain head.
        state: Its weights, with or without the prompts.
        prompt_embedding: (K, D), for a text-driven model.
        source: Name of the weights in errors.

    Raises:
        WeightsError: The configuration builds no model; or keys are missing or unexpected, or
            shapes differ; it lists them.
    """
    model: Model
    try:
        if isinstance(config, ModelConfig):
            model = UniversalModel(config, prompt_embedding)
            state = {**state, PROMPTS: model.prompt_embedding}
        else:
            model = PlainModel(config)
    except UsageError as error:
        raise WeightsError(f"The configuration of {source} builds no model: {error}") from error
    check_state(shapes_of(model), state, source)
    model.load_state_dict(state)
    return model.eval()


def weights_of(model: Model) -> dict[str, Tensor]:
    """Return the state dict of a model without its prompts."""
    return {name: value for name, value in model.state_dict().items() if name != PROMPTS}


def check_state(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], source: str
) -> None:
    """Compare the keys and shapes of weights with those of a network.

    Args:
        expected: Shape of each key.
        given: The weights.
        source: Name of the weights in the error.

    Raises:
        WeightsError: They differ; the message lists what is missing, unexpected or mis-shaped.
    """
    shapes = [
        f"{name} is {tuple(given[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "of another shape": shapes,
    }
    parts = [f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in problems.items() if keys]
    if parts:
        raise WeightsError(
            f"The weights of {source} do not fit the architecture; {'; '.join(parts)}. "
            "Nothing was loaded."
        )


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each key of a network's state dict."""
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
