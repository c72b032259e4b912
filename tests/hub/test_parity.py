"""Parity with the published system: its keys, a recipe's weights, its numbers, to 1e-4."""

import json

import pytest
import torch
from published import PARITY, hashed, parity_input, published_state

from foundation.hub.convert import convert_state_dict, published_config
from foundation.model import build_model
from foundation.networks.backbones import build_backbone

TOLERANCE = 1e-4
SIZES = (64, pytest.param(96, marks=pytest.mark.slow))


@pytest.fixture(scope="module", params=["unet", "swin_unetr"])
def model(request):
    # Integer tensors are not the recipe's but the architecture's own.
    own = build_backbone(request.param, 1).state_dict()
    constants = {f"backbone.{key.removeprefix('net.')}": value for key, value in own.items()}
    converted = convert_state_dict({"net": published_state(request.param, constants)})
    assert converted.backbone == request.param
    config = published_config(request.param)
    return build_model(config, converted.state, converted.prompt_embedding, "the recipe")


def close(actual, expected, what):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    difference = (actual.detach().double() - expected).abs().max().item()
    assert difference <= TOLERANCE, f"{what} differs by {difference:.2e}"


def summary(tensor, numbers, what):
    assert list(tensor.shape) == numbers["shape"], what
    tensor = tensor.double()
    for name, value in (
        ("mean", tensor.mean()),
        ("std", tensor.std()),
        ("min", tensor.min()),
        ("max", tensor.max()),
    ):
        close(value, numbers[name], f"{name} of {what}")


def test_hash_is_the_recipes():
    expected = [-0.63564471, -0.66603530, -0.17918372, 0.24587787]
    close(torch.from_numpy(hashed((4,), 0)), expected, "hash")


@pytest.mark.parametrize("size", SIZES)
def test_every_number_matches_the_published_system(model, size):
    numbers = json.loads((PARITY / f"{model.config.backbone}_{size}.json").read_text())
    stages = numbers["stages"]
    image = parity_input(size)
    summary(image, numbers["input"], "input")
    for *voxel, value in numbers["input"]["probe"]:
        close(image[(0, 0, *voxel)], value, f"input at {voxel}")

    with torch.no_grad():
        pyramid = model.backbone.encode(image)
        deep, full = pyramid[-1], model.backbone.decode(pyramid)
        pooled = model.head.global_feature(deep)
        projected = model.head.feature_projection(full)
        text = torch.relu(model.head.text_projection(model.prompt_embedding))
        generated = model.head.generate(deep, model.prompt_embedding)
        logits = model.head(full, generated)

    summary(deep, stages["backbone_deep"], "bottleneck feature")
    close(deep[0, :8, 0, 0, 0], stages["backbone_deep"]["first8"], "bottleneck feature")
    summary(full, stages["backbone_out"], "full-resolution feature")
    close(full[0, :8, 1, 2, 3], stages["backbone_out"]["first8"], "full-resolution feature")
    summary(pooled, stages["gap"], "global feature")
    close(pooled.flatten()[:16], stages["gap"]["first16"], "global feature")
    summary(projected, stages["precls"], "projected feature")
    close(projected[0, :, 1, 2, 3], stages["precls"]["at_1_2_3"], "projected feature")
    summary(text, stages["text_to_vision_relu"], "projected text")
    close(text[0, :8], stages["text_to_vision_relu"]["row0_first8"], "projected text")
    summary(generated[0], stages["controller_params"], "generated parameters")
    close(generated[0, 0], stages["controller_params"]["row0"], "generated parameters")
    close(generated[0, 31, :8], stages["controller_params"]["row31_first8"], "generated parameters")

    summary(logits, numbers["logits"], "logits")
    close(logits.double().mean((0, 2, 3, 4)), numbers["class_means"], "class means")
    close(logits.double().flatten(2).std(2)[0], numbers["class_stds"], "class deviations")
    for channel, *voxel, value in numbers["probes"]:
        close(logits[(0, channel, *voxel)], value, f"logit of class {channel} at {voxel}")


def test_a_subset_of_classes_equals_those_channels(model):
    image = parity_input(64)[:, :, :, :32, :32]
    channels = [27, 5, 0]
    with torch.no_grad():
        pyramid = model.backbone.encode(image)
        generated = model.head.generate(pyramid[-1], model.prompt_embedding)
        every = model.head(model.backbone.decode(pyramid), generated)
        close(model(image, channels), every[:, channels], "logits of a subset")
