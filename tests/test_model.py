"""The model, its configuration and its head, on the smallest network."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from tiny import logits, tiny_model

from foundation import from_pretrained
from foundation.config import ClassSpec, ModelConfig, Preprocessing, TextSpec
from foundation.errors import UsageError, WeightsError
from foundation.model import PlainModel, UniversalModel, weights_of
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
    least = ModelConfig(name="least", backbone="unet", classes=(ClassSpec("liver", "a liver"),))
    assert ModelConfig.from_json(least.to_json()) == least


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 1"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"text": {"encoder": "x", "voice": 1}}, "text: unknown key 'voice'"),
        ({"classes": [{"name": "liver"}]}, "prompt"),
        ({"classes": ["liver"]}, "does not describe a model"),
        ({"preprocessing": {"spacing": 1}}, "preprocessing: unknown key 'spacing'"),
        ({"preprocessing": {"threshold": 1.5}}, "threshold is 1.5; give a number between"),
        ({"format_version": True}, "format version 1"),
        ({"backbone_options": [1]}, "backbone_options is .*; expected keys and values"),
        ({"backbone": ["unet"]}, "backbone is .*; expected str"),
        ({"preprocessing": {"spacing_mm": [1.5, float("nan"), 1.5]}}, "finite"),
        ({"preprocessing": {"spacing_mm": [1.5, 1.5]}}, "expected 3 values"),
        ({"preprocessing": {"patch_size": [16.5, 16, 16]}}, "expected int"),
        ({"classes": [{"name": 5, "prompt": "a"}]}, "expected str"),
        ({"classes": [{"name": "", "prompt": "a"}]}, "needs a name"),
        ({"classes": [{"name": "liver", "prompt": "a"}] * 2}, "Two classes are called liver"),
        ({"classes": []}, "0 classes; a network has 1 to"),
        ({"classes": [{"name": "a" * 201, "prompt": "a"}]}, "at most 200 signs"),
        ({"classes": [{"name": "liver", "prompt": "a", "parent": "liver"}]}, "the class itself"),
        ({"classes": [{"name": "liver", "prompt": "a", "parent": "arm"}]}, "no class of the model"),
        (
            {
                "classes": [
                    {"name": "a", "prompt": "a", "parent": "b"},
                    {"name": "b", "prompt": "a", "parent": "a"},
                ]
            },
            "parents of 'a' have no end",
        ),
        ({"backbone_options": {"widths": [16, 10**9]}}, "whole numbers are at most 8192"),
        ({"backbone_options": {"widths": [16] * 100_000}}, "more than 1000 values"),
        ({"backbone_options": {"widths": [[[10**9]]]}}, "whole numbers are at most"),
        ({"backbone_options": None}, "backbone_options is None; expected keys and values"),
        ({"branches": [{"classes": ["liver"], "width": 10**9, "replaces": True}]}, "1 to 8192"),
        ({"branches": [{"classes": ["liver"] * 2, "replaces": True}]}, "liver twice"),
        ({"text": {"dim": 10**9}}, "dim is 1000000000"),
        ({"name": "a\x1b[2J"}, r"name is 'a\\x1b\[2J'; give a line"),
        ({"name": " "}, "name is empty"),
        ({"divisor": 10**6}, "divisor is 1000000; it must be 1 to 1024"),
    ],
)
def test_a_configuration_is_read_strictly(
    changes: dict[str, object], message: str, model: UniversalModel
) -> None:
    with pytest.raises(WeightsError, match=message):
        ModelConfig.from_json(altered(model.config, **changes))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"name": "liver"}', "[" * 100_000, "1" * 5000]
)
def test_what_is_no_configuration_says_so(text: str) -> None:
    with pytest.raises(
        WeightsError, match=r"folder/config\.json (is not|does not describe a model)"
    ):
        ModelConfig.from_json(text, source="folder/config.json")


def test_a_missing_field_is_an_error(model: UniversalModel) -> None:
    raw = json.loads(model.config.to_json())
    del raw["backbone"]
    with pytest.raises(WeightsError, match="backbone"):
        ModelConfig.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"orientation": "RAX"}, "orientation is 'RAX'; give three letters.*RAS, LPS, SPL"),
        ({"orientation": "RLS"}, "orientation is 'RLS'; give three letters"),
        ({"orientation": "RA"}, "orientation is 'RA'; give three letters"),
        ({"hu_mean_std": ((0.0, 1.0),) * 2}, "a pair for each of the 1 HU windows"),
        ({"hu_mean_std": ((0.0, 0.0),)}, "with a deviation above 0"),
        ({"hu_windows": ()}, "low < high"),
        ({"hu_windows": ((250.0, -175.0),)}, "low < high"),
        ({"hu_windows": ((NAN, 250.0),)}, "low < high"),
        ({"hu_windows": ((-1e300, 250.0),)}, "within ±1e"),
        ({"hu_windows": ((1.0, 2.0, 3.0),)}, "pairs"),
        ({"hu_windows": ((-175.0, 250.0),) * 65}, "1 to 64 pairs"),
        ({"hu_mean_std": ((NAN, 1.0),)}, "a pair for each of the 1 HU windows"),
        ({"spacing_mm": (1.5, 0.0, 1.5)}, "three numbers from 0.1 to 50 mm"),
        ({"spacing_mm": (1.5, 1e-9, 1.5)}, "three numbers from 0.1"),
        ({"spacing_mm": (1.5, NAN, 1.5)}, "three numbers"),
        ({"spacing_mm": (1.5, 1.5)}, "three numbers"),
        ({"patch_size": (96, -1, 96)}, "three whole numbers of voxels from 1 to 4096"),
        ({"patch_size": (96, 10**9, 96)}, "three whole numbers"),
        ({"patch_size": (96, 16.5, 96)}, "three whole numbers"),
        ({"patch_size": (96, 96)}, "three whole numbers"),
        ({"overlap": 1.0}, "overlap is 1.0; give a share from 0 to 0.9"),
        ({"overlap": 0.9999999}, "overlap is 0.9999999; give a share from 0 to 0.9"),
        ({"overlap": NAN}, "overlap is nan"),
        ({"threshold": 0.0}, "threshold is 0.0; give a number between 0 and 1"),
        ({"threshold": NAN}, "threshold is nan"),
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
    alone.load_state_dict(weights_of(model), strict=False)
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


# --- the state dict -------------------------------------------------------------------------------


def test_a_state_dict_carries_the_prompts(model: UniversalModel, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "best.pt")
    other = UniversalModel(model.config).eval()
    other.load_state_dict(torch.load(tmp_path / "best.pt"), strict=True)
    assert torch.equal(logits(other), logits(model))


def test_a_grown_model_loads_its_state_into_a_grown_one_and_no_other(
    model: UniversalModel,
) -> None:
    grown, same = copy.deepcopy(model), copy.deepcopy(model)
    row = torch.linspace(-1, 1, 8)
    for each, rows in ((grown, row), (same, -row)):
        each.add_class("stent", embedding=rows, text=each.config.text)
    same.load_state_dict(grown.state_dict(), strict=True)
    assert torch.equal(logits(same), logits(grown))
    with pytest.raises(RuntimeError, match=r"weights have 4 classes, the model has 3\. Build it"):
        model.load_state_dict(grown.state_dict())
    rebuilt = UniversalModel(grown.config)
    rebuilt.load_state_dict(grown.state_dict(), strict=True)
    assert torch.equal(logits(rebuilt.eval()), logits(grown))


def test_a_model_is_filled_from_nothing(model: UniversalModel) -> None:
    with torch.device("meta"):
        empty = UniversalModel(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(logits(empty.eval()), logits(model))


def test_without_prompts_nothing_is_computed(model: UniversalModel, image: torch.Tensor) -> None:
    bare = UniversalModel(model.config).eval()
    weights = {k: v for k, v in model.state_dict().items() if k != "prompt_embedding"}
    assert bare.load_state_dict(weights, strict=False).missing_keys == ["prompt_embedding"]
    for compute in (lambda: bare(image), lambda: bare.logits_at(image, torch.zeros(2, 1).long())):
        with pytest.raises(UsageError, match="prompt embeddings of 'tiny' are all zero"):
            compute()
    bare.prompt_embedding = model.prompt_embedding
    assert torch.equal(logits(bare), logits(model))


# --- what is asked of it --------------------------------------------------------------------------


@torch.no_grad()
def test_any_prompts_have_logits(model: UniversalModel, image: torch.Tensor) -> None:
    given = model.logits(image, model.prompt_embedding[[2, 0]])
    torch.testing.assert_close(given, model(image, [2, 0]))
    with pytest.raises(UsageError, match=r"prompts has shape \(3, 7\); give \(K, 8\)"):
        model.logits(image, torch.zeros(3, 7))


@pytest.mark.parametrize(
    "shape", [(1, 16, 16, 16), (16, 16, 16), (1, 2, 16, 16, 16), (1, 1, 16, 16)]
)
def test_an_image_of_another_shape_is_refused(
    model: UniversalModel, shape: tuple[int, ...]
) -> None:
    for compute in (model, model.features, model.encoder):
        with pytest.raises(UsageError, match=rf"shape {re.escape(str(shape))}.*\(B, 1, X, Y, Z\)"):
            compute(torch.rand(shape))


@pytest.mark.parametrize("channels", [["liver"], [3], [0, 1.5], [-4]])
def test_channels_are_indices(model: UniversalModel, channels: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"give indices into `classes`, 0 to 2"):
        model(torch.rand(1, 1, 16, 16, 16), channels)


def test_a_model_is_shown_in_a_few_lines(model: UniversalModel) -> None:
    shown = repr(model)
    assert shown.count("\n") == 2 and "Conv3d" not in shown
    for fact in ("UniversalModel 'tiny'", "lite_unet", "float32 on cpu", "liver, spleen", "RAS"):
        assert fact in shown
    assert "Conv3d" in repr(model.backbone)
    assert "float16" in repr(tiny_model().half()) and "bfloat16" not in repr(model)


def test_methods_save_and_load(model: UniversalModel, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "model")
    loaded = UniversalModel.from_pretrained(folder, dtype=torch.float64)
    assert (loaded.dtype, loaded.device) == (torch.float64, torch.device("cpu"))
    assert torch.equal(logits(from_pretrained(folder)), logits(model))
    with pytest.raises(UsageError, match="is a UniversalModel, not a PlainModel"):
        PlainModel.from_pretrained(folder)
    compiled = torch.compile(model)
    assert torch.equal(logits(from_pretrained(compiled.save_pretrained(folder))), logits(model))


# --- the encoder ----------------------------------------------------------------------------------


def test_the_encoder_is_one_object_with_the_facts_of_the_model(model: UniversalModel) -> None:
    own = copy.deepcopy(model)
    encoder = own.encoder
    assert encoder is own.encoder and encoder is not model.encoder
    assert (encoder.name, encoder.licence) == ("tiny", "apache-2.0")
    assert encoder.config == own.config and encoder.preprocessing == own.config.preprocessing
    assert encoder.divisor == own.config.divisor == 8
    assert not any(name.startswith("encoder") for name in own.state_dict())
    own.config = replace(own.config, name="renamed")
    assert own.train().encoder.name == "renamed" and own.encoder.training
    other = copy.deepcopy(own)
    assert other.encoder is not encoder
    other.backbone.detail.weight.data.add_(1)
    assert torch.equal(other.encoder.backbone.detail.weight, other.backbone.detail.weight)
    assert not torch.equal(encoder.backbone.detail.weight, other.backbone.detail.weight)
    own.backbone.detail = torch.nn.Conv3d(1, 16, 3, padding=1)  # as an adapter exchanges layers
    assert own.encoder is encoder and encoder.backbone.detail is own.backbone.detail


def test_every_parameter_of_the_encoder_gets_a_gradient(tmp_path: Path) -> None:
    encoder = from_pretrained(tiny_model().save_pretrained(tmp_path / "m"), features_only=True)
    assert not any("up" in name or "merge" in name for name, _ in encoder.named_parameters())
    sum(level.square().mean() for level in encoder(torch.rand(1, 1, 16, 16, 24))).backward()
    assert [name for name, each in encoder.named_parameters() if each.grad is None] == []
    saved = copy.deepcopy(encoder.state_dict())
    encoder.load_state_dict(saved, strict=True)
    with pytest.raises(UsageError, match="needs multiples of 8"):
        encoder(torch.rand(1, 1, 16, 16, 12))


def test_the_encoder_reads_a_ct_as_it_was_trained(tmp_path: Path) -> None:
    tiny = tiny_model()
    pre = replace(tiny.config.preprocessing, orientation="SPL", spacing_mm=(4.0, 2.0, 2.0))
    encoder = UniversalModel(replace(tiny.config, preprocessing=pre), torch.ones(3, 8)).encoder
    hu = np.full((20, 16, 12), -1000, np.float32)
    hu[15:, :4, 6:] = 250  # right, posterior, upper
    nib.save(nib.Nifti1Image(hu, np.diag([2.0, 2, 2, 1])), tmp_path / "ct.nii.gz")
    image = encoder.preprocess(tmp_path / "ct.nii.gz")
    assert image.shape == (1, 6, 16, 20)
    assert torch.equal(image.round(), image), "HU window to 0 and 1"
    expected = torch.zeros(6, 16, 20)
    expected[3:, 12:, :5] = 1
    assert torch.equal(image[0], expected)


# --- other tools ----------------------------------------------------------------------------------


def test_a_tensor_of_monai_is_taken(model: UniversalModel, image: torch.Tensor) -> None:
    with torch.no_grad():
        found = model(MetaTensor(image))
        assert torch.equal(torch.as_tensor(found), model(image))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_traced_model_is_right_at_another_size(model: UniversalModel, gradients: bool) -> None:
    assert model.encoder is not None
    large = torch.rand(1, 1, 32, 16, 24)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, torch.rand(1, 1, 16, 16, 16))
        torch.testing.assert_close(traced(large), model(large), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exported_model_is_right_at_another_size(model: UniversalModel, gradients: bool) -> None:
    sizes = {axis: 8 * torch.export.Dim(f"n{axis}", min=2, max=16) for axis in (2, 3, 4)}
    large = torch.rand(1, 1, 32, 16, 24)
    with torch.set_grad_enabled(gradients):
        example = (torch.rand(1, 1, 24, 16, 32),)
        exported = torch.export.export(model, example, dynamic_shapes={"image": sizes})
        torch.testing.assert_close(exported.module()(large), model(large), rtol=1e-4, atol=1e-4)


def test_an_onnx_file_is_right_at_another_size(model: UniversalModel, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    sizes = {axis: 8 * torch.export.Dim(f"n{axis}", min=2, max=16) for axis in (2, 3, 4)}
    path = str(tmp_path / "model.onnx")
    with torch.no_grad():
        example = (torch.rand(1, 1, 24, 16, 32),)
        torch.onnx.export(model, example, path, dynamo=True, dynamic_shapes={"image": sizes})
    large = torch.rand(1, 1, 32, 16, 24)
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: large.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(large), rtol=1e-2, atol=1e-2)


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
        name="fresh",
        backbone="lite_unet",
        classes=tuple(ClassSpec(str(i), str(i)) for i in range(6)),
        backbone_options={"widths": [16, 16, 16], "full": 16},
        text=TextSpec(dim=8),
    )
    fresh = UniversalModel(config, torch.randn(6, 8))
    with torch.no_grad():
        start = fresh(torch.rand(1, 1, 16, 16, 16))
    assert start.sigmoid().mean() < 0.2
    assert start.mean((0, 2, 3, 4)).std() > 0.01
