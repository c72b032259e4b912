"""A model with a head without text: what it computes, how it is segmented, saved and read back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import tiny_model

from foundation import PlainModel, UniversalModel, from_pretrained
from foundation.cli.main import main
from foundation.config import ClassSpec, NetworkConfig, Preprocessing
from foundation.errors import UsageError, WeightsError
from foundation.hub.cards import Card
from foundation.inference.predict import segment_volume
from foundation.networks.protocol import require

CLASSES = ("vertebrae_L1", "hip_left", "hip_right")
IMAGE = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))


def plain_model(activation: Any = "softmax") -> PlainModel:
    tiny = tiny_model().config
    config = NetworkConfig(
        name="plain",
        classes=tuple(map(ClassSpec, CLASSES)),
        preprocessing=Preprocessing(spacing_mm=(4.0,) * 3, patch_size=(16, 16, 16)),
        activation=activation,
        backbone=tiny.backbone,
        backbone_options=tiny.backbone_options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = PlainModel(config).eval()
    with torch.no_grad():
        model.head.convolution.weight.mul_(5)  # so that every channel wins somewhere
    return model


@torch.no_grad()
def test_a_softmax_has_background_and_always_all_classes() -> None:
    model = plain_model()
    assert model(IMAGE).shape == model(IMAGE, [2]).shape == (2, 4, 16, 16, 16)
    assert torch.equal(model(IMAGE, [2]), model(IMAGE))
    sigmoid = plain_model("sigmoid")
    assert sigmoid(IMAGE).shape == (2, 3, 16, 16, 16)
    assert torch.equal(sigmoid(IMAGE, [2, 0]), sigmoid(IMAGE)[:, [2, 0]])


@torch.no_grad()
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logits_at_voxels_are_those_of_the_forward_pass(activation: str) -> None:
    model = plain_model(activation)
    voxels = torch.tensor([[0, 5, 4095], [7, 7, 100]])
    logits, features = model.logits_at(IMAGE, voxels)
    assert features.shape == (2, 16, 3)
    every = model(IMAGE).flatten(2)
    expected = every.gather(2, voxels[:, None].expand(-1, every.shape[1], -1))
    torch.testing.assert_close(logits, expected)
    whole, _ = model.logits_at(IMAGE, torch.arange(4096).expand(2, -1))
    torch.testing.assert_close(whole, every)


@pytest.mark.filterwarnings("ignore:The given tuple")  # all of it is body
def test_a_scan_is_segmented_by_the_likeliest_channel() -> None:
    model = plain_model()
    hu = np.random.default_rng(0).uniform(-170, 250, (16, 16, 16)).astype(np.float32)
    hu[0] = -170  # all of it is body, and one window
    ct = (hu, np.diag([4.0] * 3 + [1.0]))
    found = segment_volume(model, ct, progress=False)
    image = ((torch.from_numpy(hu) + 175) / 425).clamp(0, 1)[None, None]
    with torch.no_grad():
        winner = model(image)[0].argmax(0).numpy()
    assert set(np.unique(winner)) == {0, 1, 2, 3}
    for channel, name in enumerate(CLASSES, start=1):
        assert np.mean(found.mask(name) == (winner == channel)) > 0.995  # steps of 1/255
    assert sum(found.mask(name).astype(int) for name in CLASSES).max() == 1
    alone = model.segment(ct, classes="hip_right", progress=False)
    assert np.array_equal(alone.mask("hip_right"), found.mask("hip_right"))


def test_an_activation_is_softmax_or_sigmoid() -> None:
    with pytest.raises(UsageError, match="activation is 'relu'; choose softmax or sigmoid"):
        plain_model("relu")
    with pytest.raises(UsageError, match="text-driven model has the activation sigmoid"):
        replace(tiny_model().config, activation="softmax")


def test_it_has_no_text_and_says_so() -> None:
    model = plain_model()
    assert not hasattr(model.config, "text") and "prompt" not in "".join(model.state_dict())
    require(model, "features", "Transfer")
    with pytest.raises(UsageError, match=r"Export is not .*'plain' \(PlainModel\).*text"):
        require(model, "logits", "Export")
    require(tiny_model(), "logits", "Export")


# --- files ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_saved_and_loaded_it_is_the_same(activation: str, tmp_path: Path) -> None:
    model = plain_model(activation)
    folder = model.save_pretrained(tmp_path / "model")
    names = {"config.json", "model.safetensors", "SHA256SUMS", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    loaded = from_pretrained(folder)
    assert isinstance(loaded, PlainModel) and not loaded.training
    assert loaded.config == model.config and torch.equal(loaded(IMAGE), model(IMAGE))
    assert isinstance(from_pretrained(folder, features_only=True)(IMAGE), list)
    content = json.loads((folder / "config.json").read_text())
    assert content["activation"] == activation and content["divisor"] == 8
    assert [each["name"] for each in content["classes"]] == list(CLASSES)
    card = Card.parse("plain", (folder / "README.md").read_text(), "card")
    assert f"a head without text ({activation})" in card.text and "Text encoder" not in card.text
    with pytest.raises(UsageError, match="is a PlainModel, not a UniversalModel"):
        UniversalModel.from_pretrained(folder)


def test_loading_is_strict(tmp_path: Path) -> None:
    folder = plain_model().save_pretrained(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(WeightsError, match="damaged or was changed"):
        from_pretrained(folder)
    text = tiny_model().save_pretrained(tmp_path / "text")
    sums = (text / "SHA256SUMS").read_text().splitlines(keepends=True)
    (text / "SHA256SUMS").write_text("".join(line for line in sums if "prompt" not in line))
    with pytest.raises(WeightsError, match="no sum for prompt_embedding"):
        from_pretrained(text)


def test_the_command_line_segments_with_it(tmp_path: Path) -> None:
    folder = plain_model().save_pretrained(tmp_path / "model")
    hu = np.full((24, 24, 24), -1000, np.float32)
    hu[4:20, 4:20, 4:20] = 40
    nib.save(nib.Nifti1Image(hu, np.diag([4.0] * 3 + [1.0])), tmp_path / "ct.nii.gz")
    out = tmp_path / "out"
    ran = main(
        ["segment", str(tmp_path / "ct.nii.gz"), "-m", str(folder), "-o", str(out), "--quiet"]
    )
    assert ran == 0 and list(out.rglob("*.nii.gz"))
    assert main(["info", str(folder)]) == 0
