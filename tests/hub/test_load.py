"""Saving and loading without a network: strict, whole, and errors that say what to do."""

import copy
import json
import os
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import empty_state
from safetensors.torch import load_file, save_file
from tiny import logits, tiny_model
from torch import nn

import foundation.hub.load as hub
import foundation.hub.saved as saved
from foundation.config import Origin
from foundation.errors import HubError, UsageError, WeightsError
from foundation.files import file_sha256
from foundation.hub import convert
from foundation.hub.cards import Card
from foundation.hub.folder import (
    CALIBRATION,
    CARD,
    CONFIG,
    PROMPTS,
    REQUIRED,
    SUMS,
    WEIGHTS,
    write_sums,
)
from foundation.hub.load import from_pretrained, model_card
from foundation.hub.new_cards import Base, Results
from foundation.hub.saved import base_of, save_calibration
from foundation.hub.saved import save_pretrained as save
from foundation.imaging.expected_dice import Calibration
from foundation.model import UniversalModel
from foundation.networks import Encoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_model(), tmp_path / "model")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this test must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def rewrite(folder: Path, file: str, tensors: dict[str, torch.Tensor]) -> None:
    """Replace a tensor file and give it its right sum, so that only its content is wrong."""
    save_file(tensors, folder / file)
    resum(folder)


def resum(folder: Path) -> None:
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in (CONFIG, WEIGHTS, PROMPTS)]
    (folder / SUMS).write_text("".join(lines))


def test_a_saved_model_is_a_folder_that_gives_it_back(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*REQUIRED, CARD}
    loaded = from_pretrained(folder)
    assert loaded.config == tiny_model().config
    assert torch.equal(logits(loaded), logits(tiny_model()))
    assert not any(module.training for module in loaded.modules())
    assert model_card(folder).metadata["universal_ct"]["classes"] == 3
    assert all(
        file_sha256(folder / name) in (folder / CARD).read_text() for name in (CONFIG, WEIGHTS)
    )


def test_whoever_may_read_the_configuration_may_read_the_weights(folder: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == modes["README.md"]


def test_sums_are_as_sha256sum_reads_them(folder: Path) -> None:
    lines = (folder / SUMS).read_text().splitlines()
    assert [line[64:] for line in lines] == [f"  {CONFIG}", f"  {WEIGHTS}", f"  {PROMPTS}"]


def test_half_precision_on_disk_loads_in_single(tmp_path: Path) -> None:
    model = tiny_model()
    full, half = save(model, tmp_path / "full"), save(model, tmp_path / "half", dtype=torch.float16)
    assert (half / WEIGHTS).stat().st_size < 0.6 * (full / WEIGHTS).stat().st_size
    loaded = from_pretrained(half)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.prompt_embedding, model.prompt_embedding)
    torch.testing.assert_close(logits(loaded), logits(model), atol=0.02, rtol=0.02)


def test_dtype_and_device_of_the_parameters(folder: Path) -> None:
    loaded = from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    with pytest.raises(UsageError, match=r"torch\.int8.*floating-point"):
        from_pretrained(folder, dtype=torch.int8)
    with pytest.raises(UsageError, match="Unknown device 'gpu'"):
        from_pretrained(folder, device="gpu")
    assert next(from_pretrained(folder, device="auto").parameters()).device.type != "meta"


def test_a_model_has_the_sum_of_its_weights_until_they_change(folder: Path) -> None:
    expected = file_sha256(folder / WEIGHTS)
    assert tiny_model().weights_sha256 is None, "they came from no file"
    model = from_pretrained(folder)
    assert model.weights_sha256 == expected
    hu = np.linspace(-500, 500, 16**3, dtype=np.float32).reshape(16, 16, 16)
    ct = (hu, np.diag([1.5, 1.5, 1.5, 1.0]))
    assert model.segment(ct, device="cpu").model_sha256 == expected
    assert model.to(torch.float64).train().requires_grad_(False).weights_sha256 == expected
    assert copy.deepcopy(model).weights_sha256 is None
    model.add_class("stent", embedding=torch.ones(8), text=model.config.text)
    assert model.weights_sha256 is None
    trained = from_pretrained(folder)
    with torch.no_grad():
        trained.head.controller.bias.add_(1)
    assert trained.weights_sha256 is None
    with torch.inference_mode():
        assert from_pretrained(folder).weights_sha256 == expected


def test_a_model_with_an_adapter_is_not_its_base(folder: Path) -> None:
    pytest.importorskip("peft")
    model = from_pretrained(folder)
    model.add_adapter("contrast")
    assert model.weights_sha256 is None and model.merge_adapter().weights_sha256 is None
    model.delete_adapter()
    assert model.weights_sha256 == file_sha256(folder / WEIGHTS)


def test_features_only_gives_the_pyramid(folder: Path) -> None:
    encoder = from_pretrained(folder, features_only=True)
    assert isinstance(encoder, Encoder) and not encoder.training
    image = torch.rand(1, 1, 16, 16, 16)
    pyramid = encoder(image)
    assert [f.shape[1] for f in pyramid] == list(encoder.channels)
    assert [16 // f.shape[2] for f in pyramid] == list(encoder.strides)
    expected = tiny_model().backbone.encode(image)
    assert all(torch.equal(a, b) for a, b in zip(pyramid, expected, strict=True))


@pytest.mark.parametrize("name", REQUIRED)
def test_incomplete_folder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=rf"not a complete saved model: it lacks {name}"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, PROMPTS])
def test_changed_file_is_named_with_both_sums(folder: Path, name: str) -> None:
    expected = file_sha256(folder / name)
    with (folder / name).open("ab") as file:
        file.write(b" ")
    actual = file_sha256(folder / name)
    with pytest.raises(WeightsError, match=rf"{name} is damaged.*{expected}.*{actual}"):
        from_pretrained(folder)


def test_the_card_may_be_edited(folder: Path) -> None:
    with (folder / CARD).open("a") as file:
        file.write("\nSeen in our hospital.\n")
    from_pretrained(folder)


def test_lfs_pointer_is_recognised(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(WeightsError, match="git lfs pull"):
        from_pretrained(folder)


def test_sums_without_a_file_or_with_nonsense(folder: Path) -> None:
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text(lines[0])
    with pytest.raises(WeightsError, match=r"no sum for model\.safetensors"):
        from_pretrained(folder)
    (folder / SUMS).write_text("<html>\n")
    with pytest.raises(WeightsError, match="line that is not"):
        from_pretrained(folder)


def test_keys_and_shapes_that_differ_are_listed(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["head.extra"] = torch.zeros(1)
    del state["head.controller.bias"]
    state["head.text_projection.weight"] = torch.zeros(256, 9)
    rewrite(folder, WEIGHTS, state)
    with pytest.raises(WeightsError) as caught:
        from_pretrained(folder)
    message = str(caught.value)
    assert "1 missing: head.controller.bias" in message
    assert "1 unexpected: head.extra" in message
    assert "head.text_projection.weight is (256, 9), not (256, 8)" in message


def test_long_lists_are_counted() -> None:
    expected = {f"k{n}": (1,) for n in range(20)}
    with pytest.raises(WeightsError, match=r"20 missing: k0, .*k7 and 12 more"):
        convert.check_state(expected, {}, "w")


def test_prompt_embeddings_must_fit_the_classes(folder: Path) -> None:
    rewrite(folder, PROMPTS, {"prompt_embedding": torch.zeros(2, 8)})
    with pytest.raises(WeightsError, match=r"\(2, 8\).*shape \(3, 8\)"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": {"encoder": "open_clip:ViT-B-32/openai"}}, r"text is .*none.*ViT-B-32.*mixed"),
        ({"text": {"revision": "0" * 64}}, "of two encoders, or of other prompts, must not"),
        ({"classes": {"prompt": "A CT of a lung"}}, "prompts is .*liver.*lung.*must not be mixed"),
    ],
)
def test_embeddings_of_another_encoder_or_prompt_do_not_load(
    folder: Path, change: dict[str, dict[str, str]], message: str
) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for part, values in change.items():
        (config[part] if part == "text" else config[part][0]).update(values)
    (folder / CONFIG).write_text(json.dumps(config))
    resum(folder)
    with pytest.raises(WeightsError, match=message):
        from_pretrained(folder)


def test_embeddings_that_do_not_say_their_origin_do_not_load(folder: Path) -> None:
    rewrite(folder, PROMPTS, load_file(folder / PROMPTS))
    with pytest.raises(WeightsError, match="text is None"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "vgg"}, r"builds no model: Unknown backbone 'vgg'"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"format_version": 99}, "format version"),
        (
            {"preprocessing": {"overlap": 2}},
            "a model: preprocessing: overlap is 2.0; give",
        ),
        ({"preprocessing": {"hu_windows": [[1, 2, 3]]}}, "does not describe a model"),
    ],
)
def test_configuration_is_read_strictly(
    folder: Path, change: dict[str, object], message: str
) -> None:
    config = {**json.loads((folder / CONFIG).read_text()), **change}
    (folder / CONFIG).write_text(json.dumps(config))
    resum(folder)
    with pytest.raises(WeightsError, match=message):
        from_pretrained(folder)


def test_not_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04 a pickle in a zip")
    resum(folder)
    with pytest.raises(WeightsError, match="not a safetensors file"):
        from_pretrained(folder)


def test_failed_saving_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(saved, "save_file", full_disk)
    for target in (folder, folder.with_name("new")):
        with pytest.raises(OSError, match="No space"):
            save(tiny_model(1), target)
    assert os.listdir(folder.parent) == ["model"]
    assert torch.equal(logits(from_pretrained(folder)), logits(tiny_model(0)))


def test_saving_replaces_a_model_but_no_other_files(folder: Path) -> None:
    save(tiny_model(1), folder)
    assert torch.equal(logits(from_pretrained(folder)), logits(tiny_model(1)))
    (folder / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"other files \(thesis\.tex\)"):
        save(tiny_model(2), folder)
    with pytest.raises(UsageError, match="is a file"):
        save(tiny_model(2), folder / "thesis.tex")
    (folder / "thesis.tex").unlink()
    (folder / SUMS).unlink()  # now it may be anybody's configuration and read-me
    with pytest.raises(UsageError, match=r"other files \(README\.md, config\.json"):
        save(tiny_model(2), folder)
    assert os.listdir(folder.parent) == ["model"]


def test_a_given_card_is_written(tmp_path: Path) -> None:
    card = Card("mine", {"license": "mit"}, "# Mine\n")
    folder = save(tiny_model(), tmp_path / "model", card=card)
    assert model_card(folder).metadata == {"license": "mit"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("universal-ct-swin-unter", "Did you mean 'universal-ct-swin-unetr'"),
        ("liver", "Known models: universal-ct, universal-ct-swin-unetr, universal-ct-unet"),
        ("./nowhere", r"no file or folder '\./nowhere'"),
        ("a/b/c", "no file or folder 'a/b/c'"),
        ("weights.pth", r"no file or folder 'weights\.pth'"),
    ],
)
def test_unknown_names(no_network: None, name: str, message: str) -> None:
    for load in (from_pretrained, model_card):
        with pytest.raises(HubError, match=message):
            load(name)


def test_other_files_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii.gz"
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="neither a saved folder nor a checkpoint"):
        from_pretrained(path)


def test_paths_may_hold_an_at_sign(tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "me@home")
    assert from_pretrained(str(folder)).classes == tiny_model().classes


def test_published_file_from_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mine.pth"
    torch.save({"net": empty_state("unet"), "epoch": 1}, path)
    model = from_pretrained(path)
    assert model.config.licence == "cc-by-nc-nd-4.0"
    assert len(model.classes) == 32
    assert "CC BY-NC-ND" in caplog.text
    encoder = from_pretrained(path, features_only=True)
    assert encoder.channels == (64, 128, 256, 512)


def test_checkpoint_without_a_head_is_an_encoder(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pth"
    state = {key: value for key, value in empty_state("unet").items() if "backbone." in key}
    torch.save({"net": state}, path)
    with pytest.raises(WeightsError, match="features_only=True"):
        from_pretrained(path)
    assert isinstance(from_pretrained(path, features_only=True), Encoder)


def test_embedded_weights_need_no_network(no_network: None) -> None:
    model = from_pretrained("universal-ct")
    assert model.config.name == "universal-ct"
    assert model.config.licence == "apache-2.0"
    with pytest.raises(UsageError, match="no revisions"):
        from_pretrained("universal-ct@v1")


def test_missing_embedded_weights_are_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("foundation.hub.cards.PACKAGE", tmp_path / "foundation")
    (tmp_path / "model_cards").mkdir()
    (tmp_path / "model_cards" / "universal-ct.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(WeightsError, match="Install universal-ct again"):
        from_pretrained("universal-ct")


def test_segment_loads_a_model_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[UniversalModel] = []
    monkeypatch.setattr(
        UniversalModel, "segment", lambda self, ct, **options: seen.append(self), raising=False
    )
    hub.segment("ct.nii.gz", folder)
    hub.segment("ct.nii.gz", str(folder), classes=["liver"])
    assert seen[0] is seen[1]
    save(tiny_model(1), folder)
    os.utime(folder / SUMS, ns=(0, 1))
    hub.segment("ct.nii.gz", folder)
    assert torch.equal(logits(seen[2]), logits(tiny_model(1)))
    hub.segment("ct.nii.gz", tiny_model(2))
    assert torch.equal(logits(seen[3]), logits(tiny_model(2)))


def test_dtype_may_be_given_by_its_name(folder: Path) -> None:
    assert from_pretrained(folder, dtype="float16").prompt_embedding.dtype is torch.float16
    for wrong in ("half", torch.int8, "int8"):
        with pytest.raises(UsageError, match=r"dtype is .*(half|int8).*float16, bfloat16"):
            from_pretrained(folder, dtype=wrong)


def test_wrapped_models_are_saved_as_the_models_inside(tmp_path: Path) -> None:
    plain, inside = tiny_model(), tiny_model()
    inside.backbone = torch.compile(inside.backbone)  # type: ignore[assignment]
    compiled: nn.Module = torch.compile(plain)  # type: ignore[assignment]
    wrapped = (compiled, nn.DataParallel(plain), nn.DataParallel(compiled), inside)
    for number, each in enumerate(wrapped):
        loaded = from_pretrained(save(each, tmp_path / str(number)))
        assert torch.equal(logits(loaded), logits(plain))
    with pytest.raises(UsageError, match="This is a Encoder, not a Model"):
        save(plain.encoder, tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_unchanged_weights_keep_their_card(tmp_path: Path) -> None:
    model = from_pretrained("universal-ct")
    for dtype in (None, torch.float16):
        save(model, tmp_path / "copy", dtype=dtype)
        assert model_card(tmp_path / "copy") == replace(
            model_card("universal-ct"), name=str(tmp_path / "copy")
        )
    assert from_pretrained(tmp_path / "copy").origin == Origin(
        "universal-ct", "", str(tmp_path / "copy"), file_sha256(tmp_path / "copy" / WEIGHTS)
    )
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    changed = model_card(save(model, tmp_path / "changed"))
    assert changed.metadata["model-index"][0]["results"] == []
    assert changed.metadata["base_model"] == "universal-ct"
    assert changed.metadata["base_model_relation"] == "finetune"
    assert changed.metadata["license"] == "other"
    assert "The scans and labels that were trained on may add terms" in changed.text
    results = Results("mine", "validation", 2, {"liver": 0.5}, {"liver": 0.25}, 3.0)
    given = model_card(save(model, tmp_path / "changed", results=results))
    assert "| liver | 0.500 | 0.250 |" in given.text and "tolerance of 3 mm" in given.text


def calibration_of(folder: Path) -> Calibration:
    sha256 = file_sha256(folder / WEIGHTS)
    return Calibration(sha256, 1.0, {"liver": 0.1}, (), (-0.1,), (0.1,), 200, "renderings")


def test_a_calibration_stays_with_its_weights_and_with_no_others(
    folder: Path, tmp_path: Path
) -> None:
    assert from_pretrained(folder).calibration is None
    save_calibration(folder, calibration_of(folder))
    model = from_pretrained(folder)
    assert model.calibration == calibration_of(folder)
    assert from_pretrained(save(model, tmp_path / "copy")).calibration == model.calibration
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    other = save(model, tmp_path / "changed")
    assert from_pretrained(other).calibration is None and not (other / CALIBRATION).exists()
    with pytest.raises(WeightsError, match="is of other weights"):
        save_calibration(other, calibration_of(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: {**raw, "slope": float("nan")}, "expected a finite"),
        (lambda raw: {**raw, "low": []}, "one interval more"),
        (lambda raw: {**raw, "weights_sha256": "0" * 64}, "of other weights"),
        (lambda raw: {**raw, "format_version": 99}, "format version"),
        (lambda raw: [raw], "trust.json"),
    ],
)
def test_a_calibration_of_a_stranger_is_checked(folder: Path, change: Any, message: str) -> None:
    path = save_calibration(folder, calibration_of(folder))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(WeightsError, match=r"trust\.json is damaged or was changed"):
        from_pretrained(folder)
    write_sums(folder, (CONFIG, WEIGHTS, PROMPTS, CALIBRATION))
    with pytest.raises(WeightsError, match=message):
        from_pretrained(folder)


def test_the_base_of_a_card_may_be_given(tmp_path: Path) -> None:
    base = base_of(from_pretrained("universal-ct"))
    card = model_card(save(tiny_model(name="mine"), tmp_path / "mine", base=base))
    assert card.weights["base"] == asdict(base) and base.source == "universal-ct"
    published = Base("universal-ct-unet", "universal-ct-unet", "0" * 64)
    card = model_card(save(tiny_model(name="mine"), tmp_path / "mine", base=published))
    assert card.metadata["base_model"] == "ljwztc/CLIP-Driven-Universal-Model"


def test_the_folder_of_a_run_stands_for_what_it_holds(tmp_path: Path) -> None:
    save(tiny_model(), tmp_path / "run" / "model")
    assert torch.equal(logits(from_pretrained(tmp_path / "run")), logits(tiny_model()))
    assert model_card(tmp_path / "run").text.startswith("# tiny\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="is not a complete saved model"):
        from_pretrained(tmp_path / "empty")
