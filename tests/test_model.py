"""The model, its configuration and its head, on the smallest network."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import logits, tiny_model

from foundation.config import ClassSpec, ModelConfig, Preprocessing, TextSpec
from foundation.errors import UsageError, WeightsError
from foundation.model import UniversalModel
from foundation.networks.head import GENERATED, TextDrivenHead


@pytest.fixture(scope="module")
def model() -> UniversalModel:
    return tiny_model()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))


def altered(config: ModelConfig, **changes: object) -> str:
    return json.dumps({**json.loads(config.to_json()), **changes})


def test_a_configuration_survives_json(model: UniversalModel) -> None:
    full = replace(
        model.config,
        standardise_text=True,
        preprocessing=Preprocessing(
            spacing_mm=(4.0, 4.0, 5.0),
            hu_windows=((-175.0, 250.0), (-1000.0, 1000.0)),
            patch_size=(64, 64, 32),
            overlap=0.25,
            threshold=0.4,
        ),
        licence="cc-by-nc-nd-4.0",
        licence_notice="not for sale",
    )
    assert ModelConfig.from_json(full.to_json()) == full
    assert full.class_names == ("liver", "spleen", "liver_tumor")
    least = ModelConfig("least", "unet", (ClassSpec("liver", "a liver"),))
    assert ModelConfig.from_json(least.to_json()) == least


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 1"),
        ({"colour": "red"}, r"unknown field \['colour'\] in ModelConfig"),
        ({"text": {"encoder": "x", "voice": 1}}, r"unknown field \['voice'\] in TextSpec"),
        ({"classes": [{"name": "liver"}]}, "prompt"),
        ({"classes": ["liver"]}, "does not describe a model"),
        ({"preprocessing": {"spacing": 1}}, r"unknown field \['spacing'\] in Preprocessing"),
        ({"preprocessing": {"threshold": 1.5}}, r"threshold in \(0, 1\)"),
    ],
)
def test_a_configuration_is_read_strictly(
    changes: dict[str, object], message: str, model: UniversalModel
) -> None:
    with pytest.raises(WeightsError, match=message):
        ModelConfig.from_json(altered(model.config, **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"name": "liver"}'])
def test_what_is_no_configuration_says_so(text: str) -> None:
    with pytest.raises(WeightsError, match=r"folder/config\.json is not"):
        ModelConfig.from_json(text, source="folder/config.json")


def test_a_missing_field_is_an_error(model: UniversalModel) -> None:
    raw = json.loads(model.config.to_json())
    del raw["backbone"]
    with pytest.raises(WeightsError, match="backbone"):
        ModelConfig.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"orientation": "LPS"}, "orientation is 'LPS'; only 'RAS'"),
        ({"hu_windows": ()}, "low < high"),
        ({"hu_windows": ((250.0, -175.0),)}, "low < high"),
        ({"spacing_mm": (1.5, 0.0, 1.5)}, "must be positive"),
        ({"patch_size": (96, -1, 96)}, "must be positive"),
        ({"overlap": 1.0}, r"overlap must lie in \[0, 1\)"),
        ({"threshold": 0.0}, r"threshold in \(0, 1\)"),
    ],
)
def test_preprocessing_says_what_is_allowed(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Preprocessing(**wrong)


def test_logits_are_one_map_a_class(model: UniversalModel, image: torch.Tensor) -> None:
    with torch.no_grad():
        result = model(image)
    assert result.shape == (2, 3, 16, 16, 16)
    assert model.classes == model.config.class_names
    different = [(result[:, i] - result[:, j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(different) > 1e-4  # the prompt decides


def test_a_subset_of_classes_equals_those_rows(model: UniversalModel, image: torch.Tensor) -> None:
    with torch.no_grad():
        everything = model(image)
        for channels in ([2], [0, 2], [1, 0]):
            torch.testing.assert_close(model(image, channels), everything[:, channels])


def test_a_class_does_not_depend_on_the_others(model: UniversalModel, image: torch.Tensor) -> None:
    fewer = replace(model.config, classes=model.config.classes[1:])
    alone = UniversalModel(fewer, model.prompt_embedding[1:]).eval()
    alone.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(alone(image), model(image)[:, 1:])


def test_logits_at_voxels_equal_the_forward_pass_there(
    model: UniversalModel, image: torch.Tensor
) -> None:
    voxels = torch.stack([torch.randperm(16**3)[:100] for _ in range(2)])
    with torch.no_grad():
        everything = model(image).flatten(2)
        sampled, features = model.logits_at(image, voxels)
    expected = everything.gather(2, voxels[:, None].expand(-1, 3, -1))
    torch.testing.assert_close(sampled, expected)
    assert features.shape == (2, model.backbone.full_channels, 100)


def test_chunks_do_not_change_the_logits(model: UniversalModel, image: torch.Tensor) -> None:
    head = model.head
    with torch.no_grad():
        pyramid = model.backbone.encode(image)
        full = model.backbone.decode(pyramid)
        generated = head.generate(pyramid[-1], model.prompt_embedding)
        assert generated.shape == (2, 3, GENERATED)
        whole = head(full, generated, chunk_voxels=None)
        chunked = head(full, generated, chunk_voxels=1000)  # does not divide 16³
    torch.testing.assert_close(chunked, whole)


def test_the_encoder_is_the_pyramid(model: UniversalModel, image: torch.Tensor) -> None:
    encoder = model.encoder
    with torch.no_grad():
        pyramid, expected = encoder(image), model.backbone.encode(image)
    assert all(map(torch.equal, pyramid, expected))
    for level, channels, stride in zip(pyramid, encoder.channels, encoder.strides, strict=True):
        assert level.shape == (2, channels, *(16 // stride,) * 3)
    shared = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in encoder.parameters()} <= shared


@pytest.mark.parametrize("through", ["forward", "logits_at"])
def test_a_size_that_does_not_fit_names_the_divisor(model: UniversalModel, through: str) -> None:
    image, voxels = torch.rand(1, 1, 16, 12, 16), torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(UsageError, match=r"\(16, 12, 16\) voxels; lite_unet needs multiples of 8"):
        model(image) if through == "forward" else model.logits_at(image, voxels)


@pytest.mark.parametrize("training", [False, True])
def test_a_patch_of_one_deepest_voxel_says_what_is_enough(training: bool) -> None:
    model = tiny_model().train(training)
    with pytest.raises(UsageError, match=r"\(8, 8, 8\) voxels.*Make one side 16 or more"):
        model(torch.rand(1, 1, 8, 8, 8))
    assert model(torch.rand(1, 1, 16, 8, 8)).isfinite().all()


def test_prompts_of_another_shape_are_refused(model: UniversalModel) -> None:
    with pytest.raises(UsageError, match=r"\(3, 7\).*3 classes and embeddings of 8"):
        UniversalModel(model.config, torch.zeros(3, 7))
    assert not UniversalModel(model.config).prompt_embedding.any()


def test_prompts_are_not_among_the_weights(model: UniversalModel) -> None:
    assert "prompt_embedding" not in model.state_dict()
    assert dict(model.named_buffers())["prompt_embedding"].shape == (3, 8)


def test_a_seed_is_one_model() -> None:
    assert torch.equal(logits(tiny_model(3)), logits(tiny_model(3)))
    assert not torch.equal(logits(tiny_model(3)), logits(tiny_model(4)))


def test_standardised_text_is_centred_and_scaled() -> None:
    torch.manual_seed(0)
    plain, standard = TextDrivenHead(16, 16, 8), TextDrivenHead(16, 16, 8, standardise_text=True)
    assert set(standard.state_dict()) - set(plain.state_dict()) == {"text_shift", "text_scale"}
    standard.load_state_dict(plain.state_dict(), strict=False)
    deep, prompts = torch.randn(1, 16, 2, 2, 2), torch.randn(4, 8)
    torch.testing.assert_close(standard.generate(deep, prompts), plain.generate(deep, prompts))
    standard.text_shift.fill_(0.5)
    standard.text_scale.fill_(3.0)
    torch.testing.assert_close(
        standard.generate(deep, prompts), plain.generate(deep, (prompts - 0.5) * 3)
    )


def test_classes_start_absent_and_different() -> None:
    """Before training every logit is low, and the generated layers depend on the prompt."""
    torch.manual_seed(0)
    config = ModelConfig(
        "fresh",
        "lite_unet",
        tuple(ClassSpec(str(i), str(i)) for i in range(6)),
        backbone_options={"widths": [16, 16, 16], "full": 16},
        text=TextSpec(dim=8),
    )
    fresh = UniversalModel(config, torch.randn(6, 8))
    with torch.no_grad():
        start = fresh(torch.rand(1, 1, 16, 16, 16))
    assert start.sigmoid().mean() < 0.2
    assert start.mean((0, 2, 3, 4)).std() > 0.01
