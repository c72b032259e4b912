"""A model from its configuration and its weights, which must fit each other exactly.

A configuration may come from anybody. So the network is first built without memory, its tensors are
compared with those that there are, and only then do these take their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from foundation.config import ModelConfig, NetworkConfig
from foundation.errors import UsageError, WeightsError, listed

if TYPE_CHECKING:
    pass

from foundation.model.base import Model
from foundation.model.plain import PlainModel
from foundation.model.universal import PROMPTS, UniversalModel
from foundation.networks.backbones import BUILDING

_Module = TypeVar("_Module", bound=nn.Module)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def build_model(
    config: NetworkConfig,
    state: Mapping[str, Tensor],
    prompt_embedding: Tensor | None,
    source: str,
    *,
    read: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Model:
    """Build the model of `config` with exactly the given weights, in evaluation mode.

    Args:
        config: A `ModelConfig` for a text-driven model; without text it has a plain head.
        state: Its weights, with or without the prompts. Where they are float32 they become the
            model's own and are not copied.
        prompt_embedding: (K, D), for a text-driven model.
        source: Name of the weights in errors.
        read: Reads the weights once `state`, which is then on the meta device, has been found to
            fit; None where `state` holds the weights themselves.

    Raises:
        WeightsError: The configuration builds no model; or keys are missing or unexpected, or
            shapes or types of number differ, or values are not finite; it lists them.
    """
    model = check_fit(config, state, source)
    weights = dict(state if read is None else read())
    if isinstance(model, UniversalModel):
        if prompt_embedding is None:
            raise WeightsError(f"{source} has no prompt embeddings, which its classes need.")
        expected = tuple(model.prompt_embedding.shape)
        check_state({PROMPTS: expected}, {PROMPTS: prompt_embedding}, source)
        weights[PROMPTS] = prompt_embedding
    return fill(lambda: _new(config), model, weights, source).eval()


def check_fit(config: NetworkConfig, state: Mapping[str, Tensor], source: str) -> Model:
    """Build the model of `config` without memory, and compare its tensors with given ones.

    Args:
        config: Of the model.
        state: The weights, which may be on the meta device: only names, shapes and types count.
            With or without the prompts.
        source: Name of the weights in errors.

    Returns:
        The model without weights, for `fill`.

    Raises:
        WeightsError: As `build_model`, but for values.
    """
    try:
        model = without_memory(lambda: _new(config))
    except (UsageError, *BUILDING) as error:
        raise WeightsError(f"The configuration of {source} builds no model: {error}") from error
    expected = dict(model.state_dict())
    if empty := [key for key, tensor in expected.items() if not tensor.numel()]:
        raise WeightsError(
            f"The configuration of {source} builds no model: {listed(empty)} would have no values."
        )
    if isinstance(model, UniversalModel) and PROMPTS not in state:
        del expected[PROMPTS]
    check_state({key: tuple(tensor.shape) for key, tensor in expected.items()}, state, source)
    check_types(expected, state, source)
    return model


def _new(config: NetworkConfig) -> Model:
    return UniversalModel(config) if isinstance(config, ModelConfig) else PlainModel(config)


class _NoMemory(TorchFunctionMode):
    """Tensors that a constructor makes to be filled have a shape, and no memory.

    Those that it computes from others are real: MONAI's Swin reads numbers off them as it is built.
    """

    makers = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func in self.makers and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


def without_memory(make: Callable[[], _Module]) -> _Module:
    """Build a network whose parameters have shapes and no memory.

    Args:
        make: Builds it.

    Returns:
        The network; `fill` gives it its weights.
    """
    with _NoMemory():
        return make()


def fill(
    make: Callable[[], _Module], empty: _Module, state: Mapping[str, Tensor], source: str
) -> _Module:
    """Give a network that was built without memory its weights, which it then holds.

    Args:
        make: Builds the network. It is built again where it has tensors that are not in `state`,
            such as buffers that are not saved: those are only there in a real one.
        empty: What `without_memory` returned.
        state: Exactly the tensors of its state dict; floating-point numbers become float32.
        source: Name of the weights in errors.

    Returns:
        The network, with weights.

    Raises:
        WeightsError: A value is not finite.
    """
    own, storages = empty.state_dict(), set()
    single = {}
    for key, value in state.items():
        value = (value.float() if own[key].is_floating_point() else value).contiguous()
        place = value.untyped_storage().data_ptr()
        # Two tensors of a checkpoint may share memory; two of a network must not.
        single[key] = value.clone() if place in storages else value
        storages.add(place)
    check_finite(single, source)
    if _has_more(empty, state):
        network = make()
        network.load_state_dict(single)
        return network
    empty.load_state_dict(single, assign=True)
    return empty


def _has_more(module: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether something without memory would stay, or two names would no longer be one tensor."""
    named: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
    named.update(module.named_parameters(remove_duplicate=False))
    tied = len({id(tensor) for tensor in named.values()}) < len(named)
    unsaved = any(tensor.is_meta and name not in state for name, tensor in named.items())
    return tied or unsaved or any(tensor.is_meta for tensor in _attributes(module))


def _attributes(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that parts of a network hold and that are neither parameters nor buffers."""
    for part in module.modules():
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            several = value.values() if isinstance(value, dict) else value
            inside = several if isinstance(value, dict | list | tuple) else (value,)
            yield from (each for each in inside if isinstance(each, Tensor))


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


def check_types(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are no floating-point numbers; integers where a network has integers.

    Args:
        expected: The network's tensors.
        given: The weights, under some of the same names.
        source: Name of the weights in the error.

    Raises:
        WeightsError: See above; the message lists them.
    """
    wrong = [
        f"{name} is {str(value.dtype).removeprefix('torch.')}"
        for name, value in given.items()
        if value.dtype
        not in (_FLOATS if expected[name].is_floating_point() else (expected[name].dtype,))
    ]
    if wrong:
        raise WeightsError(
            f"The weights of {source} are not of a type that can be computed with: "
            f"{listed(wrong)}. Store them as float16, bfloat16, float32 or float64; integers are "
            "no weights."
        )


def check_finite(given: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that hold NaN or infinity: a network with one finds nothing, or everything.

    Args:
        given: The weights.
        source: Name of the weights in the error.

    Raises:
        WeightsError: See above; the message lists the tensors and how many values are wrong.
    """
    wrong = []
    for name, value in given.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            count = value.numel() - int(torch.isfinite(value).sum())
            wrong.append(f"{name} ({count} of {value.numel()} values)")
    if wrong:
        raise WeightsError(
            f"The weights of {source} hold NaN or infinity in {listed(wrong)}. Masks would be "
            "wrong. Get or train the weights again."
        )


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each key of a network's state dict."""
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
