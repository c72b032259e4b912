"""Published checkpoints: every layout converts and loads strictly; everything else is refused."""

import pickle
import re

import pytest
import torch
from monai.networks.nets import BasicUNetPlusPlus, SegResNet
from published import empty_state, published_keys, published_state
from safetensors.torch import save_file
from tiny import tiny_model

from foundation.config import ModelConfig
from foundation.errors import UsageError, WeightsError
from foundation.hub.convert import convert_state_dict, published_config, read_checkpoint
from foundation.model import UniversalModel
from foundation.networks.backbones import build_backbone
from foundation.taxonomy import CLASSES


def renamed(state, change):
    return {change(key): tensor for key, tensor in state.items()}


def flat(state):
    return renamed(state, lambda key: key.removeprefix("backbone."))


def distributed(state):
    return renamed(state, lambda key: f"module.{key}")


def backbone_only(state):
    return {key: tensor for key, tensor in state.items() if key.startswith("backbone.")}


LAYOUTS = {
    "released U-Net": ("unet", lambda s: {"net": distributed(s)}),
    "released Swin UNETR, flat": ("swin_unetr", lambda s: {"net": distributed(flat(s))}),
    "the published training script": (
        "swin_unetr",
        lambda s: {"net": distributed(s), "optimizer": {}, "scheduler": {}, "epoch": 500},
    ),
    "one process": ("unet", lambda s: {"net": s, "epoch": 3}),
    "loaded and saved by the published loader": (
        "swin_unetr",
        lambda s: {
            "net": renamed(s, lambda key: f"backbone.{key}" if key.startswith("backbone.") else key)
        },
    ),
    "under state_dict": ("unet", lambda s: {"state_dict": s}),
    "under model": ("swin_unetr", lambda s: {"model": distributed(s)}),
    "bare": ("unet", lambda s: s),
    "bare and flat": ("swin_unetr", flat),
    "compiled and distributed": (
        "unet",
        lambda s: {"net": distributed(renamed(s, lambda key: f"_orig_mod.{key}"))},
    ),
    "by Lightning, compiled": (
        "swin_unetr",
        lambda s: {"state_dict": renamed(s, lambda key: f"model._orig_mod.{key}")},
    ),
    "under model_state_dict": ("unet", lambda s: {"model_state_dict": s}),
    "distributed twice": ("unet", lambda s: distributed(distributed(s))),
    "with the output layer of Swin UNETR": (
        "swin_unetr",
        lambda s: s | {"backbone.out.conv.conv.weight": torch.zeros(32, 48, 1, 1, 1)},
    ),
    "in half precision": (
        "unet",
        lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    ),
    "without batch statistics": (
        "unet",
        lambda s: {k: v for k, v in s.items() if "running_" not in k and "num_batches" not in k},
    ),
}

BACKBONES_ONLY = {
    "SuPreM U-Net": (
        "unet",
        lambda s: {
            "net": distributed(backbone_only(s))
            | {"module.backbone.out_tr.final_conv.weight": torch.zeros(32, 64, 1, 1, 1)}
        },
    ),
    "SuPreM Swin UNETR": (
        "swin_unetr",
        lambda s: {
            "net": distributed(backbone_only(s))
            | {"module.backbone.out.conv.conv.bias": torch.zeros(25)}
        },
    ),
    "Swin UNETR with MONAI's own names": ("swin_unetr", lambda s: flat(backbone_only(s))),
}


@pytest.fixture(scope="module")
def models():
    return {name: UniversalModel(published_config(name)) for name in ("unet", "swin_unetr")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_converts_and_loads_strictly(layout, models):
    backbone, arrange = LAYOUTS[layout]
    converted = convert_state_dict(arrange(empty_state(backbone)))
    assert converted.backbone == backbone
    assert converted.prompt_embedding.shape == (32, 512)
    assert converted.prompt_embedding.dtype == torch.float32
    assert not any(t.dtype == torch.float16 for t in converted.state.values())
    state = {**converted.state, "prompt_embedding": converted.prompt_embedding}
    models[backbone].load_state_dict(state, strict=True)


@pytest.mark.parametrize("layout", BACKBONES_ONLY)
def test_checkpoints_without_a_head_load_as_backbones(layout, models):
    backbone, arrange = BACKBONES_ONLY[layout]
    converted = convert_state_dict(arrange(empty_state(backbone)))
    assert converted.backbone == backbone
    assert converted.prompt_embedding is None
    own = {key.removeprefix("backbone."): tensor for key, tensor in converted.state.items()}
    models[backbone].backbone.load_state_dict(own, strict=True)


def test_values_land_where_their_names_say(models):
    state = published_state("unet")
    converted = convert_state_dict({"net": distributed(state)})
    ours = converted.state
    for theirs, own in {
        "backbone.down_tr64.ops.0.conv1.weight": "backbone.down.0.0.0.weight",
        "backbone.down_tr512.ops.1.bn1.bias": "backbone.down.3.1.1.bias",
        "backbone.up_tr256.ops.0.conv1.weight": "backbone.merge.2.0.0.weight",
        "backbone.up_tr64.up_conv.bias": "backbone.up.0.bias",
        "precls_conv.2.weight": "head.feature_projection.2.weight",
        "GAP.3.bias": "head.global_feature.3.bias",
        "text_to_vision.weight": "head.text_projection.weight",
    }.items():
        assert torch.equal(ours[own], state[theirs])
    assert torch.equal(ours["head.controller.weight"], state["controller.weight"].flatten(1))
    assert torch.equal(converted.prompt_embedding, state["organ_embedding"])
    kept = [key for key in state if "running_" not in key and "num_batches" not in key]
    assert len(ours) == len(kept)


@pytest.mark.parametrize(
    ("backbone", "theirs", "prefix", "size"),
    [
        (
            "segresnet",
            lambda: SegResNet(init_filters=16, out_channels=25, dropout_prob=0.0),
            "module.",
            16,
        ),
        ("unetpp", lambda: BasicUNetPlusPlus(features=(32, 32, 64, 128, 256, 32)), "", 32),
    ],
)
def test_monais_own_networks_give_the_same_features(backbone, theirs, prefix, size):
    theirs = theirs().eval()
    state = {f"{prefix}{key}": tensor for key, tensor in theirs.state_dict().items()}
    converted = convert_state_dict({"net": state})
    assert converted.backbone == backbone and converted.prompt_embedding is None
    ours = build_backbone(backbone, 1).eval()
    ours.load_state_dict(
        {key.removeprefix("backbone."): tensor for key, tensor in converted.state.items()}
    )
    final = theirs.conv_final if backbone == "segresnet" else theirs.final_conv_0_4
    image = torch.rand(1, 1, size, size, size)
    with torch.no_grad():
        expected = theirs(image)
        expected = expected if backbone == "segresnet" else expected[0]
        torch.testing.assert_close(final(ours.decode(ours.encode(image))), expected)


def unet_with(**changes):
    return empty_state("unet") | changes


def test_an_unknown_key_is_named():
    with pytest.raises(WeightsError, match=r"conversion table: down_tr64\.ops\.7"):
        convert_state_dict(unet_with(**{"backbone.down_tr64.ops.7.conv1.weight": torch.zeros(1)}))
    with pytest.raises(WeightsError, match=r"'unet'.*rotation_head\.weight"):
        convert_state_dict(unet_with(**{"rotation_head.weight": torch.zeros(4, 4)}))
    with pytest.raises(WeightsError, match=r"controller\.weight"):  # the head is not in a backbone
        convert_state_dict(unet_with(**{"backbone.controller.weight": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("backbone.down_tr128.ops.1.conv1.weight", "backbone.down.1.1.0.weight"),
        ("GAP.3.bias", "head.global_feature.3.bias"),
        ("organ_embedding", "organ_embedding (classes, text dimension) is missing"),
    ],
)
def test_a_missing_key_is_named(gone, named):
    state = empty_state("unet")
    del state[gone]
    with pytest.raises(WeightsError, match=re.escape(named)):
        convert_state_dict(state)


def test_another_shape_is_named():
    wrong = {"backbone.down_tr64.ops.0.conv1.weight": torch.zeros(32, 3, 3, 3, 3)}
    with pytest.raises(WeightsError, match=r"0\.0\.0\.weight is \(32, 3, 3, 3, 3\), not \(32, 1"):
        convert_state_dict(unet_with(**wrong))


def test_two_keys_for_one_parameter_are_refused():
    twice = {
        "backbone.up_tr64.up_conv.bias": torch.zeros(128),
        "up_tr64.up_conv.bias": torch.ones(128),
    }
    with pytest.raises(WeightsError, match=r"Two keys .* 'up_tr64\.up_conv\.bias'"):
        convert_state_dict(unet_with(**twice))


def test_random_class_embeddings_are_refused_but_lend_their_features():
    state = empty_state("unet")
    for key in ("organ_embedding", "text_to_vision.weight", "text_to_vision.bias"):
        del state[key]
    state["organ_embedding.weight"] = torch.zeros(32, 256)
    with pytest.raises(WeightsError, match="random class embeddings"):
        convert_state_dict({"net": state})
    converted = convert_state_dict({"net": state}, features_only=True)
    assert converted.prompt_embedding is None
    assert all(key.startswith("backbone.") for key in converted.state)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "no entries"),
        ({"epoch": 3, "loss": 0.5}, "no plain tensors: epoch, loss"),
        ({0: torch.zeros(1), "a": torch.zeros(1)}, "no plain tensors: 0"),
        ({"a": torch.zeros(2).to_sparse()}, "no plain tensors: a"),
        ({"net": {"a": torch.zeros(1, device="meta")}}, "no plain tensors: a"),
        ({"layer1.0.conv.weight": torch.zeros(1)}, "No known backbone.*layer1.0.conv.weight"),
        ({"backbone.dints_space.cell_tree.x": torch.zeros(1)}, "DiNTS checkpoint"),
    ],
)
def test_what_is_no_published_checkpoint_says_so(checkpoint, message):
    with pytest.raises(WeightsError, match=message):
        convert_state_dict(checkpoint)


@pytest.mark.parametrize("backbone", ["unet", "swin_unetr"])
def test_published_configuration_has_the_classes_and_prompts_of_record(backbone):
    config = published_config(backbone)
    assert config.class_names == tuple(known.name for known in CLASSES)
    prompts = [spec.prompt for spec in config.classes]
    # The published embeddings were made from these very sentences, typing errors included.
    assert prompts[7] == "A computerized tomography of a Arota"
    assert prompts[0] == "A computerized tomography of a Spleen"
    assert config.preprocessing.hu_windows == ((-175.0, 250.0),)
    assert config.preprocessing.spacing_mm == (1.5, 1.5, 1.5)
    assert config.licence == "cc-by-nc-nd-4.0" and "CC BY-NC-ND" in config.licence_notice
    assert not config.standardise_text
    assert ModelConfig.from_json(config.to_json()) == config
    assert len(published_keys(backbone)) == {"unet": 117, "swin_unetr": 170}[backbone]


def test_other_checkpoints_have_unnamed_classes():
    config = published_config("unet", num_classes=3)
    assert config.class_names == ("class_1", "class_2", "class_3")
    with pytest.raises(UsageError, match=r"'dints'.*unet, swin_unetr"):
        published_config("dints")


class Runs:
    """A pickle that would call `print` when read."""

    def __reduce__(self):
        return print, ("code ran",)


def test_checkpoints_are_read_from_files(tmp_path):
    weights = {"net": {"a": torch.arange(3.0)}, "epoch": 4, "optimizer": {"lr": [1e-4]}}
    torch.save(weights, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"a": torch.arange(3.0)}, tmp_path / "a.safetensors")
    for name in ("a.pth", "old.pth"):
        assert torch.equal(read_checkpoint(tmp_path / name)["net"]["a"], torch.arange(3.0))
    assert torch.equal(read_checkpoint(tmp_path / "a.safetensors")["a"], torch.arange(3.0))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_are_no_checkpoint_say_what_they_are(tmp_path, capsys):
    torch.save({"net": {"a": torch.zeros(1000)}}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    save_file({"a": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    safe = (tmp_path / "whole.safetensors").read_bytes()
    torch.save({"net": Runs()}, tmp_path / "code.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    contents = {
        "page.pth": b"\n<!DOCTYPE html><html><title>Sign in</title></html>",
        "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "cut.pth": whole[: len(whole) // 2],
        "cut.safetensors": safe[: len(safe) // 2],
        "empty.pth": b"",
        "noise.pth": bytes(range(40, 200)) * 9,
        "pickle.pth": pickle.dumps({"net": Runs()}),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, message in {
        "absent.pth": "No checkpoint at",
        "page.pth": "web page",
        "pointer.pth": "Git LFS pointer",
        "cut.pth": "damaged or cut short",
        "cut.safetensors": "damaged or cut short",
        "empty.pth": "damaged or cut short",
        "noise.pth": "not a PyTorch checkpoint",
        "code.pth": "would run code",
        "pickle.pth": "not a PyTorch checkpoint",
        "list.pth": "holds a list",
    }.items():
        with pytest.raises(WeightsError, match=message):
            read_checkpoint(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out


def test_our_own_bare_weights_say_what_they_lack():
    with pytest.raises(WeightsError, match=r"without its configuration.*save_pretrained"):
        convert_state_dict({"state_dict": tiny_model().state_dict()})
