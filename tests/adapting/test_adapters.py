"""Adapters in memory: they change a model and bring it classes, and leave its weights alone."""

import sys

import pytest
import torch
from tiny import adapted, grow, grown, logits, tiny_model
from torch import nn

from foundation.adapting import low_rank
from foundation.adapting.adapters import (
    add_adapter,
    default_name,
    delete_adapter,
    merge_adapter,
    set_adapter,
)
from foundation.errors import MissingExtraError, UsageError
from foundation.networks.backbones import build_backbone

pytest.importorskip("peft")


def test_an_untrained_adapter_says_nothing() -> None:
    model = grown("side", "L1")
    before = logits(model)
    add_adapter(model, "spine", rank=3)
    assert torch.equal(logits(model), before)
    asking = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert asking, "there is something to train"
    assert all("lora_" in name or name.startswith("branches.0.") for name in asking)
    assert any(name.startswith("backbone.down") for name in asking), "convolutions too"
    assert {"head.controller.lora_A.spine.weight", "branches.0.side.project.0.weight"} <= asking
    assert "branches.0.head.controller.base_layer.weight" not in asking, "else it must be stored"


def test_a_seed_is_one_start() -> None:
    state = [adapted(seed=seed).state_dict() for seed in (1, 1, 2)]
    name = "backbone.down.0.0.0.lora_A.spine.weight"
    assert torch.equal(state[0][name], state[1][name])
    assert not torch.equal(state[0][name], state[2][name])


def test_without_its_adapter_a_model_is_what_it_was_bit_for_bit() -> None:
    plain = tiny_model()
    model = adapted()
    with_it = logits(model)
    assert with_it.shape[1] == 5
    assert not torch.allclose(with_it[:, :3], logits(plain), atol=1e-3), "old classes change too"
    set_adapter(model, None)
    assert (model.classes, model.config) == (plain.classes, plain.config)
    assert torch.equal(logits(model), logits(plain))
    set_adapter(model, "spine")
    assert torch.equal(logits(model), with_it)


@pytest.mark.parametrize("kind", ["prompt", "side"])
def test_merging_gives_a_plain_model(kind: str) -> None:
    model = adapted(kind)
    said = logits(model)
    merged = merge_adapter(model)
    assert torch.equal(logits(model), said) and model.adapters.active == "spine"
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), said, atol=1e-4, rtol=1e-4)
    set_adapter(model, None)
    torch.testing.assert_close(logits(merge_adapter(model, "spine")), logits(merged))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a.b"}, "cannot name an adapter"),
        ({"name": "x", "rank": 0}, "rank is 0"),
        ({"name": "x", "classes": ["L1"]}, "not the classes that were added last"),
    ],
)
def test_wrong_requests_say_so(options: dict[str, object], message: str) -> None:
    model = grown("head", "L1", "L2")
    with pytest.raises(UsageError, match=message):
        add_adapter(model, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"no adapter 'y'; it has none"):
        set_adapter(model, "y")
    with pytest.raises(UsageError, match="no adapter None"):
        merge_adapter(model)
    assert not low_rank.has_adapters(model)


def test_peft_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny_model()
    with pytest.raises(MissingExtraError, match=r"universal-ct\[tune\]"):
        add_adapter(model, "spine")
    assert not model.adapters.names


@pytest.mark.parametrize("name", ["unet", "mednext"])
def test_other_backbones_take_adapters(name: str) -> None:
    """Published and MONAI's networks: nothing changes at first, everything can change."""
    torch.manual_seed(0)
    backbone = build_backbone(name, 1).eval()
    image = torch.rand(1, 1, *(2 * backbone.divisor,) * 3)
    with torch.no_grad():
        before = backbone.decode(backbone.encode(image))
        low_rank.inject(backbone, "a", 2, 2.0)
        assert torch.equal(backbone.decode(backbone.encode(image)), before)
        assert {
            k: tuple(v.shape) for k, v in low_rank.tensors(backbone, "a").items()
        } == low_rank.shapes(backbone, 2)
        for tensor in low_rank.tensors(backbone, "a").values():
            tensor.add_(0.01)
        changed = backbone.decode(backbone.encode(image))
        assert not torch.allclose(changed, before)
        low_rank.merge(backbone, "a")
        merged = build_backbone(name, 1).eval()
        merged.load_state_dict(backbone.state_dict())
        torch.testing.assert_close(
            merged.decode(merged.encode(image)), changed, atol=1e-4, rtol=1e-4
        )


def test_layers_that_peft_would_change_wrongly_are_left() -> None:
    module = nn.ModuleDict(
        {
            "plain": nn.Conv3d(4, 4, 3),
            "groups": nn.Conv3d(4, 4, 3, groups=4),
            "dilated": nn.Conv3d(4, 4, 3, dilation=2),
            "circular": nn.Conv3d(4, 4, 3, padding_mode="circular"),
            "transposed": nn.ConvTranspose3d(4, 4, 2),
            "linear": nn.Linear(4, 4),
        }
    )
    assert set(low_rank.adaptable(module)) == {"plain", "linear"}


def test_a_deleted_adapter_leaves_the_model_as_it_was() -> None:
    model = adapted("side")
    model.set_adapter(None)
    grow(model, "head", "stent")
    model.add_adapter("devices", classes=["stent"])
    devices = logits(model)
    model.delete_adapter("spine")
    assert model.adapters.names == ("devices",) and torch.equal(logits(model), devices)
    model.delete_adapter()
    assert not model.adapters.names and not low_rank.has_adapters(model)
    plain = tiny_model()
    assert model.config == plain.config and torch.equal(logits(model), logits(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(UsageError, match="no adapter 'spine'; it has none"):
        delete_adapter(model, "spine")


def test_an_adapter_is_named_after_its_classes() -> None:
    assert default_name(["vertebra L1 (lumbar)"]) == "vertebra-L1-lumbar"
    assert default_name(["L1", "L2", "L3"]) == "L1-and-2-more"
    for classes in (["?"], ["psoas abscess"]):
        add_adapter(tiny_model(), default_name(classes))
