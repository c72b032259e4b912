"""Added classes: nothing old changes by a bit, and what they have of their own travels along."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import logits, tiny_model

from foundation import from_pretrained
from foundation.adapting.classes import add_classes, nearest_classes, zero_shot_note
from foundation.config import BranchSpec, ClassSpec, ModelConfig
from foundation.errors import UsageError
from foundation.hub.saved import save_pretrained
from foundation.model import UniversalModel
from foundation.networks.branches import SideDecoder, rows_by_branch, trained_rows
from foundation.text import class_prompt

KINDS = ("prompt", "head", "side")


def grow(model: UniversalModel, kind: str, *names: str, seed: int = 5) -> None:
    rows = torch.randn(
        len(names), model.config.text.dim, generator=torch.Generator().manual_seed(seed)
    )
    specs = [ClassSpec(name, f"A CT of a {name}") for name in names]
    add_classes(model, specs, kind=kind, embeddings=rows)  # type: ignore[arg-type]


def trained(model: UniversalModel) -> None:
    """As if the branches had been trained."""
    with torch.no_grad():
        for number, tensor in enumerate(model.branches.parameters()):
            generator = torch.Generator().manual_seed(number)
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
def test_old_logits_stay_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = tiny_model()
    before = logits(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grow(model, kind, "stent", "coil")
    grow(model, "head", "clip")
    trained(model)
    after = logits(model)
    assert after.shape[1] == 6 and torch.equal(after[:, :3], before)
    rows = state.pop("prompt_embedding")
    assert torch.equal(model.state_dict()["prompt_embedding"][:3], rows)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    loaded = from_pretrained(save_pretrained(model, tmp_path / "grown"))
    assert loaded.config == model.config
    assert torch.equal(logits(loaded), after)


@pytest.mark.parametrize(
    ("name", "size"), [("lite_unet", 64), pytest.param("unet", 32, marks=pytest.mark.slow)]
)
def test_old_logits_of_real_sizes_stay_too(name: str, size: int) -> None:
    """Matrix products of other sizes may be summed in another order: 32 and 512 show it."""
    tiny = tiny_model()
    classes = tuple(ClassSpec(f"class_{i}", f"A CT of {i}") for i in range(32))
    config = replace(
        tiny.config,
        backbone=name,
        backbone_options={},
        classes=classes,
        text=replace(TEXT, dim=512),
    )
    torch.manual_seed(0)
    model = UniversalModel(config, torch.randn(32, 512)).eval()
    image = torch.rand(1, 1, size, size, size)
    voxels = torch.arange(0, size**3, 50)[None]
    with torch.no_grad():
        before, at = model(image), model.logits_at(image, voxels)[0]
        for kind in KINDS:
            grow(model, kind, kind)
        assert torch.equal(model(image)[:, :32], before)
        assert torch.equal(model.logits_at(image, voxels)[0][:, :32], at)


TEXT = tiny_model().config.text


def test_every_kind_starts_as_its_prompt_alone_would() -> None:
    found = []
    for kind in KINDS:
        model = tiny_model()
        grow(model, kind, "stent", "coil")
        found.append(logits(model)[:, 3:])
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    assert found[0].std() > 0


def test_classes_are_read_out_in_the_order_asked_for() -> None:
    model = tiny_model()
    grow(model, "head", "stent", "coil")
    grow(model, "side", "clip")
    trained(model)
    image = torch.linspace(0, 1, 16**3).view(1, 1, 16, 16, 16)
    with torch.no_grad():
        everything, some = model(image), model(image, channels=[5, 0, 3])
        at, _ = model.logits_at(image, torch.arange(16**3)[None])
    torch.testing.assert_close(some, everything[:, [5, 0, 3]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(at, everything.flatten(2), rtol=1e-4, atol=1e-4)


def test_branches_are_segmented_as_other_classes() -> None:
    """The sliding window reads them out with the others, and writes a mask."""
    model = tiny_model()
    grow(model, "side", "stent")
    with torch.no_grad():
        model.branches[0].head.controller.bias[-1] = 50.0
    hu = torch.linspace(0, 100, 16**3).view(16, 16, 16).numpy()
    result = model.segment((hu, torch.eye(4).numpy() * 1.5), postprocess=False, progress=False)
    assert result.mask("stent").all()


@pytest.mark.parametrize("strides", [(1, 2, 4, 8), (1, 2, 4, 8, 16, 32), (2, 4), (1,)])
def test_a_side_decoder_goes_by_strides_and_channels(strides: tuple[int, ...]) -> None:
    class Shaped:
        channels = tuple(4 + level for level in range(len(strides)))
        full_channels = 6

    shaped = Shaped()
    shaped.strides = strides  # type: ignore[attr-defined]
    side = SideDecoder(shaped, 4)  # type: ignore[arg-type]
    size = 2 * strides[-1]
    pyramid = [
        torch.rand(1, channels, *(size // stride,) * 3)
        for channels, stride in zip(Shaped.channels, strides, strict=True)
    ]
    added = side(pyramid)
    assert added.shape == (1, 6, size, size, size)
    assert (added == 0).all(), "it adds nothing before it has learnt something"


def test_the_configuration_says_what_was_added() -> None:
    model = tiny_model()
    plain = model.config.to_json()
    assert "branches" not in plain, "weights without branches read as they always did"
    grow(model, "head", "stent", "coil")
    grow(model, "prompt", "clip")
    config = ModelConfig.from_json(model.config.to_json())
    assert config == model.config and trained_rows(config) == 3
    assert [(i, list(rows)) for i, rows in rows_by_branch(config)] == [(0, [3, 4]), (1, [5])]
    with pytest.raises(UsageError, match="are not the last"):
        replace(config, branches=(BranchSpec(("liver",)),))
    with pytest.raises(UsageError, match="choose prompt, head or side"):
        BranchSpec(("stent",), "tail")  # type: ignore[arg-type]


def test_neighbours_in_text_are_found_and_read() -> None:
    model = tiny_model()
    rows = model.prompt_embedding
    centre = rows.mean(0)
    near = centre + 2 * (rows[1] - centre) + 0.01 * (rows[0] - centre)
    found = nearest_classes(model, near, count=2)
    assert found[0].name == "spleen" and found[0].cosine > 0.99
    assert "as spleen is" in zero_shot_note("stent", found)
    far = nearest_classes(model, centre - (rows[1] - centre), count=3)
    assert far[-1].name == "spleen" and far[-1].cosine == pytest.approx(-1, abs=1e-5)
    assert "none is near" in zero_shot_note("stent", far[-1:])


def test_the_embedded_weights_know_what_is_near_in_text() -> None:
    """Terms of the bank, so no encoder is needed; see the measurement beside the threshold."""
    model = from_pretrained("universal-ct")
    near = {
        name: nearest_classes(model, class_prompt(name, model.config.text), count=2)
        for name in ("left renal artery", "left kidney", "vertebra L1")
    }
    assert [each.name for each in near["left renal artery"]] == ["kidney_left", "kidney_right"]
    assert near["left kidney"][0].cosine == pytest.approx(1, abs=1e-3)
    assert "much as kidney_left is" in zero_shot_note("artery", near["left renal artery"])
    assert "none is near" in zero_shot_note("L1", near["vertebra L1"])


@pytest.mark.parametrize("kind", ["head", "side"])
def test_the_plain_classifier_of_a_class_is_its_own(kind: str) -> None:
    """Trained apart for each class, and read by the class's place in the branch."""
    model = tiny_model()
    grow(model, kind, "clip", "stent", "port")
    image = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(image)
        model.get_parameter("branches.0.plain.bias").copy_(torch.tensor([1.0, 2.0, 3.0]))
        after = model(image)
        some = model(image, [0, 5, 3])
        at, _ = model.logits_at(image, torch.arange(16**3)[None])
    assert torch.equal(after[:, :3], before[:, :3]), "the old classes have nothing of it"
    added = (after - before)[0, 3:].mean((1, 2, 3))
    torch.testing.assert_close(added, torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(some, after[:, [0, 5, 3]])
    torch.testing.assert_close(at, after.flatten(2))
