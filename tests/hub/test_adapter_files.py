"""Files of adapters: small, of one base, and read strictly; alone, from a run and from the Hub."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import adapted, grow, grown, logits, tiny_model, train, with_adapter
from torch import nn

from foundation import from_pretrained
from foundation.adapting import low_rank
from foundation.adapting.adapters import (
    add_adapter,
    merge_adapter,
    set_adapter,
)
from foundation.adapting.classes import add_classes
from foundation.config import ClassSpec
from foundation.errors import HubError, MissingExtraError, UsageError, WeightsError
from foundation.hub.adapter_files import read_config, save_adapter
from foundation.hub.cards import PACKAGE, Card
from foundation.hub.folder import (
    ADAPTER_FILES,
    ADDED_CLASSES,
    CARD,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    SUMS,
    UNIVERSAL_CT,
    write_sums,
)
from foundation.hub.load import load_adapter, model_card
from foundation.hub.new_cards import Results
from foundation.hub.saved import load_folder, save_pretrained
from foundation.hub.upload import push_adapter, push_to_hub
from foundation.model import UniversalModel
from foundation.text import class_prompt
from foundation.tuning.methods import get_method

peft = pytest.importorskip("peft")


def test_several_adapters_take_turns(tmp_path: Path) -> None:
    model = adapted()
    spine = logits(model)
    set_adapter(model, None)
    grow(model, "side", "stent")
    add_adapter(model, "devices", rank=1, alpha=4.0)
    train(model, 1)
    devices = logits(model)
    assert model.adapters.names == ("spine", "devices") and model.adapters.active == "devices"
    assert model.classes[3:] == ("stent",)
    set_adapter(model, "spine")
    assert model.classes[3:] == ("L1", "L2") and torch.equal(logits(model), spine)
    for name in ("spine", "devices"):  # whichever speaks
        save_adapter(model, tmp_path / name, name, dtype=None)
    fresh = tiny_model()
    for name in ("devices", "spine"):
        assert load_adapter(fresh, tmp_path / name) == name
    torch.testing.assert_close(logits(fresh), spine)
    set_adapter(fresh, "devices")
    torch.testing.assert_close(logits(fresh), devices)
    set_adapter(fresh, None)
    assert torch.equal(logits(fresh), logits(tiny_model()))


@pytest.mark.parametrize("kind", ["prompt", "head", "side"])
def test_a_saved_adapter_comes_back(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    said = logits(model)
    for dtype, tolerance in ((None, 1e-5), (torch.float16, 5e-3)):
        folder = save_adapter(model, tmp_path / "spine", dtype=dtype)
        assert {path.name for path in folder.iterdir()} == {*ADAPTER_FILES, SUMS, CARD}
        fresh = tiny_model()
        assert load_adapter(fresh, folder, "mine") == "mine"
        assert fresh.classes == model.classes and fresh.config == model.config
        torch.testing.assert_close(logits(fresh), said, atol=tolerance, rtol=tolerance)
    card = Card.parse("spine", (folder / CARD).read_text(), CARD)
    assert card.weights["adapter_of"] == "tiny"
    assert (
        card.weights["base_sha256"]
        == json.loads((folder / UNIVERSAL_CT).read_text())["base_sha256"]
    )


def test_an_adapter_without_classes_comes_back(tmp_path: Path) -> None:
    model = tiny_model()
    add_adapter(model, "contrast")
    train(model)
    fresh = tiny_model()
    load_adapter(fresh, save_adapter(model, tmp_path / "contrast", dtype=None))
    torch.testing.assert_close(logits(fresh), logits(model))


def test_copies_of_the_head_are_not_stored(tmp_path: Path) -> None:
    large = "branches.0.head.controller.weight"
    model = adapted()
    with_copies = save_adapter(model, tmp_path / "small") / ADDED_CLASSES
    assert large not in lora_names(with_copies)
    with torch.no_grad():  # trained all the same, as by who asks for all of its gradients
        model.get_parameter("branches.0.head.controller.base_layer.weight").mul_(1.5)
    folder = save_adapter(model, tmp_path / "large", dtype=None)
    assert large in lora_names(folder / ADDED_CLASSES)
    fresh = tiny_model()
    load_adapter(fresh, folder)
    torch.testing.assert_close(logits(fresh), logits(model))


def test_an_adapter_of_the_embedded_weights_is_small(tmp_path: Path) -> None:
    """As the method `lora` makes it, for five classes."""
    lora = get_method("lora")
    model = from_pretrained("universal-ct")
    names = [f"vertebra L{number}" for number in range(1, 6)]
    specs = [ClassSpec(name, class_prompt(name)) for name in names]
    add_classes(model, specs, kind="side", width=lora.width)
    add_adapter(model, "spine", rank=lora.rank)
    train(model)
    folder = save_adapter(model, tmp_path / "spine")
    whole = PACKAGE / "weights" / "universal-ct" / "model.safetensors"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 0.02 * whole.stat().st_size


def lora_names(path: Path) -> set[str]:
    return set(load_file(path))


@pytest.mark.parametrize("kind", ["prompt", "side"])
def test_a_model_is_saved_without_adapters_or_merged(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    set_adapter(model, None)
    assert save_pretrained(merge_adapter(model, "spine"), tmp_path / "merged").is_dir()
    with pytest.raises(UsageError, match=r"save_adapter.*merge_adapter"):
        save_pretrained(model, tmp_path / "with")
    assert not (tmp_path / "with").exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(adapted(), tmp_path / "spine")
    other = tiny_model(1)
    before = logits(other)
    with pytest.raises(UsageError, match="'spine' was made for 'tiny' with weights"):
        load_adapter(other, folder)
    assert not other.adapters.names and torch.equal(logits(other), before)
    assert not low_rank.has_adapters(other)


def test_a_base_stored_in_half_precision_is_the_same_base(tmp_path: Path) -> None:
    folder = save_adapter(adapted(), tmp_path / "spine")
    half = from_pretrained(save_pretrained(tiny_model(), tmp_path / "half", dtype=torch.float16))
    assert load_adapter(half, folder) == "spine"


def test_what_an_adapter_brings_must_be_new(tmp_path: Path) -> None:
    folder = save_adapter(adapted(), tmp_path / "spine")
    model = grown("prompt", "L2")
    with pytest.raises(UsageError, match="brings L2, which the model has already"):
        load_adapter(model, folder)
    assert not low_rank.has_adapters(model), "nothing half-loaded"
    model = tiny_model()
    load_adapter(model, folder)
    with pytest.raises(UsageError, match="has an adapter 'spine' already"):
        load_adapter(model, folder)
    assert load_adapter(model, folder, "again") == "again", "another adapter's classes are away"


def test_classes_of_the_base_stay_with_it(tmp_path: Path) -> None:
    """What the base was saved with is its own; so is what was named to be."""
    saved = save_pretrained(grown("side", "stent"), tmp_path / "base")
    model = from_pretrained(saved)
    add_adapter(model, "contrast")
    set_adapter(model, None)
    assert model.classes[3:] == ("stent",)
    model = grown("head", "L1")
    grow(model, "head", "L2")
    add_adapter(model, "spine", classes=["L2"])
    set_adapter(model, None)
    assert model.classes[3:] == ("L1",)


def test_classes_added_while_an_adapter_speaks_go_with_it(tmp_path: Path) -> None:
    model = adapted()
    grow(model, "head", "L3")
    train(model)
    fresh = tiny_model()
    load_adapter(fresh, save_adapter(model, tmp_path / "spine", dtype=None))
    assert fresh.classes[3:] == ("L1", "L2", "L3")
    torch.testing.assert_close(logits(fresh), logits(model))
    set_adapter(model, None)
    assert model.classes == tiny_model().classes


def test_damage_is_noticed(tmp_path: Path) -> None:
    folder = save_adapter(adapted(), tmp_path / "spine")
    weights = folder / PEFT_WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightsError, match="damaged"):
        load_adapter(tiny_model(), folder)
    weights.unlink()
    with pytest.raises(WeightsError, match="not a complete saved adapter"):
        load_adapter(tiny_model(), folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (PEFT_CONFIG, {"r": 3}, "another shape of backbone.*save or download"),
        (PEFT_CONFIG, {"use_dora": True}, "do not belong together"),
        (PEFT_CONFIG, {"base_model_name_or_path": "another"}, "do not belong together"),
        (UNIVERSAL_CT, {"colour": "red"}, "unknown key 'colour'"),
        (UNIVERSAL_CT, {"branches": []}, r"branches' classes \[\] are not the adapter's"),
        (UNIVERSAL_CT, {"classes": [], "branches": []}, r"has the unknown branches\.0"),
        (PEFT_CONFIG, {"r": 10**9}, "rank.*is 1000000000; it must be 1 to 4096"),
        (PEFT_CONFIG, {"lora_alpha": 1e300}, "alpha is 1e.300; it must lie within"),
        (UNIVERSAL_CT, {"format_version": 2}, "format_version is 2"),
    ],
)
def test_an_adapter_is_read_strictly(
    file: str, change: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = save_adapter(adapted(), tmp_path / "spine")
    raw = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**raw, **change}))
    write_sums(folder, ADAPTER_FILES)
    model = tiny_model()
    with pytest.raises(WeightsError, match=f"(?i){message}"):
        load_adapter(model, folder)
    assert not low_rank.has_adapters(model)


def test_adapters_travel_through_the_hub(server: HubServer, tmp_path: Path) -> None:
    model = adapted("side")
    url = push_adapter(model, "lab/spine", token="hf_tests", dtype=None)
    assert "/lab/spine/commit/" in url
    assert set(server.repositories["lab/spine"].files("main")) == {*ADAPTER_FILES, SUMS, CARD}
    fresh = tiny_model()
    assert load_adapter(fresh, "lab/spine") == "spine"
    torch.testing.assert_close(logits(fresh), logits(model))
    server.log.clear()
    load_adapter(tiny_model(), "lab/spine", local_files_only=True)
    assert not server.log, "the cache is enough"
    with pytest.raises(HubError, match="no such public repository"):
        load_adapter(fresh, "lab/nothing")


def test_adapters_of_weights_that_must_not_be_changed_stay_private(
    server: HubServer,
) -> None:
    model = tiny_model(licence="cc-by-nc-nd-4.0")
    add_adapter(model, "mine")
    with pytest.raises(UsageError, match="private=True"):
        push_adapter(model, "lab/mine", token="hf_tests")
    assert not server.log
    push_adapter(model, "lab/mine", token="hf_tests", private=True)
    assert server.repositories["lab/mine"].private


def test_peft_itself_loads_it(tmp_path: Path) -> None:
    """The base's classes are what they are with our own loading; peft knows no others."""
    folder = save_adapter(adapted("side"), tmp_path / "spine", dtype=None)
    ours, base = tiny_model(), tiny_model()
    load_adapter(ours, folder)
    with_peft = peft.PeftModel.from_pretrained(base, str(folder))
    image = torch.linspace(0, 1, 16**3).view(1, 1, 16, 16, 16)
    with torch.no_grad():
        theirs = with_peft(image)
    assert not torch.allclose(theirs, logits(tiny_model()), atol=1e-3), "the adapter does something"
    assert torch.equal(theirs, logits(ours)[:, :3])
    config = peft.LoraConfig.from_pretrained(str(folder))
    assert (config.r, config.base_model_name_or_path) == (2, "tiny")


def test_an_adapter_loads_with_its_base_from_a_folder(tmp_path: Path) -> None:
    saved = save_pretrained(tiny_model(), tmp_path / "bases" / "tiny")
    model = with_adapter(from_pretrained(saved))
    model.config = replace(model.config, name="runs-folder")  # a tuning names its model so
    folder = save_adapter(model, tmp_path / "run" / "adapter", dtype=None)
    for given in (folder, tmp_path / "run"):
        loaded = from_pretrained(given)
        assert loaded.adapters.active == "spine" and loaded.classes == model.classes
        torch.testing.assert_close(logits(loaded), logits(model))
    config = read_config(folder)
    assert (config.base, config.base_source) == ("tiny", "")
    assert str(tmp_path) not in (folder / PEFT_CONFIG).read_text() + (folder / CARD).read_text()
    card = model_card(tmp_path / "run")
    assert "base_model" not in card.metadata, "a folder is no id"
    assert "Base model: `tiny`. SHA-256 of its" in card.text and config.base_sha256 in card.text
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(HubError, match=r"made for 'tiny' \(weights .*load_adapter\('.*where'\)"):
        from_pretrained(moved)
    again = from_pretrained(saved)
    again.load_adapter(moved)
    torch.testing.assert_close(logits(again), logits(model))


def test_an_adapter_refuses_a_base_that_has_changed(tmp_path: Path) -> None:
    saved = save_pretrained(tiny_model(), tmp_path / "tiny")
    folder = save_adapter(with_adapter(from_pretrained(saved)), tmp_path / "adapter")
    save_pretrained(tiny_model(1), saved)
    with pytest.raises(UsageError, match=r"made for 'tiny' with weights .*put the adapter on"):
        from_pretrained(folder)


def test_an_adapter_of_known_weights_names_them(tmp_path: Path) -> None:
    model = from_pretrained("universal-ct")
    model.add_adapter("contrast")
    train(model)
    results = Results("hospital-a", "test", 3, dice={"liver": 0.95}, agreement={"spleen": 0.9})
    model.save_adapter(tmp_path / "contrast", results=results, notes="## Thanks\n\nTo all.")
    loaded = from_pretrained(tmp_path / "contrast")
    assert (loaded.config.name, loaded.adapters.names) == ("universal-ct", ("contrast",))
    assert torch.allclose(patch_logits(loaded), patch_logits(model), atol=0.2)
    card = model_card(tmp_path / "contrast")
    assert card.metadata["base_model"] == "universal-ct"
    assert card.metadata["base_model_relation"] == "adapter"
    assert card.licence == "apache-2.0-and-that-of-the-data"
    index = ModelCard(card.render(), ignore_metadata_errors=False).data.eval_results
    found = {(each.metric_name, each.metric_value, each.dataset_split) for each in index}
    assert found == {("Dice, liver", 0.95, "test"), ("Dice agreement, spleen", 0.9, "test")}
    assert "| liver | 0.950 |" in card.text and "agreement, not accuracy" in card.text
    assert "| spleen | 0.900 |" in card.text
    assert card.text.endswith("## Thanks\n\nTo all.\n")


def patch_logits(model: UniversalModel) -> torch.Tensor:
    with torch.no_grad():
        image = torch.linspace(0, 1, 2 * 64 * 32**2).view(1, 2, 64, 32, 32)
        result: torch.Tensor = model(image, [0, 5])
    return result


def test_adapters_of_the_hub_load_with_their_base(server: HubServer, tmp_path: Path) -> None:
    push_to_hub(tiny_model(), "lab/tiny", token="hf_tests", revision="v1")
    push_to_hub(tiny_model(1), "lab/tiny", token="hf_tests")
    model = with_adapter(from_pretrained("lab/tiny@v1"))
    model.push_adapter("lab/spine", token="hf_tests", dtype=None, revision="first")
    config = json.loads(server.repositories["lab/spine"].files("first")[PEFT_CONFIG])
    assert (config["base_model_name_or_path"], config["revision"]) == ("lab/tiny", "v1")
    for where, options in (("lab/spine@first", {}), ("lab/spine", {"revision": "first"})):
        loaded = from_pretrained(where, **options)
        torch.testing.assert_close(logits(loaded), logits(model))
    assert model_card("lab/spine@first").metadata["base_model"] == "lab/tiny"
    server.log.clear()
    from_pretrained("lab/spine@first", local_files_only=True)
    assert not server.log, "the cache is enough"
    del server.repositories["lab/tiny"]
    with pytest.raises(HubError, match=r"base 'tiny' of the adapter 'spine' cannot be loaded"):
        from_pretrained("lab/spine@first", cache_dir=tmp_path / "empty")


def test_pushing_an_adapter_of_a_folder_says_what_others_lack(
    server: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = save_pretrained(tiny_model(), tmp_path / "base")
    push_adapter(with_adapter(from_pretrained(saved)), "lab/spine", token="hf_tests")
    assert "base of this adapter, tiny, is only on this machine" in caplog.text
    files = server.repositories["lab/spine"].files("main")
    assert json.loads(files[UNIVERSAL_CT])["base_folder"] == ""
    with pytest.raises(HubError, match="was in a folder and is not there"):
        from_pretrained("lab/spine")


def test_models_and_adapters_are_told_apart(tmp_path: Path) -> None:
    adapter = save_adapter(adapted(), tmp_path / "run" / "adapter")
    whole = save_pretrained(tiny_model(), tmp_path / "whole")
    with pytest.raises(UsageError, match="is a whole model, not an adapter: from_pretrained"):
        load_adapter(tiny_model(), whole)
    with pytest.raises(UsageError, match="is an adapter, not a whole model: from_pretrained"):
        load_folder(adapter)
    whole.rename(tmp_path / "run" / "model")
    with pytest.raises(UsageError, match="holds a model and an adapter"):
        from_pretrained(tmp_path / "run")
    for path in adapter.iterdir():
        if path.name not in (PEFT_CONFIG, PEFT_WEIGHTS):
            path.unlink()
    with pytest.raises(WeightsError, match=r"no universal_ct.json: peft saved this adapter"):
        load_adapter(tiny_model(), adapter)


def test_a_merged_model_is_another_model(tmp_path: Path) -> None:
    saved = save_pretrained(tiny_model(), tmp_path / "tiny", dtype=torch.float16)
    model = with_adapter(from_pretrained(saved))
    merged = model.merge_adapter()
    assert merged.config.name == "tiny-spine" and not merged.adapters.names
    assert merge_adapter(model, new_name="mine").config.name == "mine"
    folder = save_pretrained(merged, tmp_path / "merged", dtype=torch.float16)
    card = model_card(folder)
    assert card.text.startswith("# tiny-spine\n") and card.weights["classes"] == 4
    assert card.weights["base"]["name"] == "tiny" and "Base model: `tiny`" in card.text
    assert all(tensor.requires_grad for tensor in merged.parameters())


def test_reading_what_an_adapter_says_needs_no_peft(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = save_pretrained(tiny_model(), tmp_path / "tiny")
    folder = save_adapter(with_adapter(from_pretrained(saved)), tmp_path / "spine")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert read_config(folder).name == "spine"
    with pytest.raises(MissingExtraError, match="Adapters need peft"):
        from_pretrained(folder)


@pytest.mark.slow
def test_adapters_of_wrapped_models_are_saved(tmp_path: Path) -> None:
    model = adapted()
    wrapped = nn.DataParallel(torch.compile(model))  # type: ignore[arg-type]
    fresh = tiny_model()
    load_adapter(nn.DataParallel(fresh), save_adapter(wrapped, tmp_path / "spine", dtype=None))
    torch.testing.assert_close(logits(fresh), logits(model))
