"""A further class for a model: its row comes from the bank, or from the weights' own encoder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import logits, tiny_model

from foundation import add_class, from_pretrained, text
from foundation.adapting.classes import add_classes, nearest_classes, zero_shot_note
from foundation.config import ClassSpec, TextSpec
from foundation.errors import MissingExtraError, UsageError
from foundation.hub.saved import save_pretrained
from foundation.model import UniversalModel
from foundation.text import CLIP_VIT_B_32, MINILM, ONE_HOT, load_bank


@pytest.fixture
def model() -> UniversalModel:
    """The tiny model with the prompts of the prompt bank's encoder."""
    tiny = tiny_model()
    torch.manual_seed(0)
    return UniversalModel(replace(tiny.config, text=MINILM), torch.randn(3, MINILM.dim)).eval()


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "load_encoder", lambda spec: pytest.fail("used an encoder"))


def test_a_term_of_the_bank_becomes_the_last_channel(
    model: UniversalModel, no_encoder: None, tmp_path: Path
) -> None:
    before = logits(model)
    add_class(model, "renal_artery_left")
    assert model.classes == ("liver", "spleen", "liver_tumor", "renal_artery_left")
    assert model.config.classes[-1].prompt == "A computerized tomography of a left renal artery"
    row = load_bank().embedding("left renal artery")
    assert torch.equal(model.prompt_embedding[-1], row)
    torch.testing.assert_close(logits(model)[:, :3], before)
    loaded = from_pretrained(save_pretrained(model, tmp_path / "grown"))
    assert loaded.config == model.config
    torch.testing.assert_close(logits(loaded), logits(model))


def test_adding_a_class_tells_what_to_expect_and_changes_nothing_else(
    model: UniversalModel, no_encoder: None
) -> None:
    appendix = load_bank().embedding("vermiform appendix")
    before, state = logits(model), {n: v.clone() for n, v in model.state_dict().items()}
    nearest = nearest_classes(model, appendix)
    expected = model.add_class("vermiform appendix", parent="spleen")
    # What it knew before: the class itself would be the nearest of all, and say nothing.
    assert expected.neighbours == nearest
    assert {each.name for each in expected.neighbours} == {"liver", "spleen", "liver_tumor"}
    sentence = zero_shot_note("vermiform appendix", nearest)
    assert repr(expected) == str(expected) == expected.note == sentence
    assert sentence.startswith("vermiform appendix: nearest in text ")
    assert torch.equal(model.prompt_embedding[-1], appendix)
    assert model.config.classes[-1].parent == "spleen"
    assert torch.equal(logits(model)[:, :3], before)
    assert state.keys() == model.state_dict().keys()
    now = {**model.state_dict(), "prompt_embedding": model.prompt_embedding[:3]}  # it got a row
    assert all(torch.equal(value, now[name]) for name, value in state.items())


def test_method_and_function_are_one(model: UniversalModel, no_encoder: None) -> None:
    own = model.prompt_embedding[1] + 0.01
    other = UniversalModel(model.config, model.prompt_embedding.clone()).eval()
    given = {"prompt": "Spleen, too", "embedding": own, "text": MINILM, "kind": "head"}
    expected = model.add_class("second spleen", **given)  # type: ignore[arg-type]
    assert expected == add_class(other, "second spleen", **given)  # type: ignore[arg-type]
    assert expected.neighbours[0].name == "spleen" and expected.neighbours[0].cosine > 0.99
    assert "segmented much as spleen is" in expected.note
    assert model.config == other.config


def test_a_prompt_outside_the_bank_needs_the_extra(
    model: UniversalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text.load_encoder.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"universal-ct\[text\]"):
        add_class(model, "stent", prompt="A stent that no bank knows")
    assert model.classes == tiny_model().classes, "nothing half-added"


def test_embeddings_of_another_encoder_are_refused(model: UniversalModel, no_encoder: None) -> None:
    own = torch.randn(MINILM.dim)
    for wrong in (CLIP_VIT_B_32, *(replace(MINILM, **change) for change in CHANGES)):
        with pytest.raises(UsageError, match="of two encoders cannot be mixed"):
            add_class(model, "stent", embedding=own, text=wrong)
    with pytest.raises(UsageError, match="which encoder made the embedding"):
        add_class(model, "stent", embedding=own)
    with pytest.raises(UsageError, match=r"shape \(3,\); .*one vector of 384"):
        add_class(model, "stent", embedding=torch.zeros(3), text=MINILM)
    add_class(model, "stent", prompt="A stent", parent="liver", embedding=own, text=MINILM)
    assert torch.equal(model.prompt_embedding[-1], own)
    assert model.config.classes[-1].parent == "liver"


CHANGES = (
    {"revision": "0" * 64},
    {"template": "A photo of a {}."},
    {"pooling": "cls"},
    {"normalised": False},
)


def test_a_class_is_added_once(model: UniversalModel, no_encoder: None) -> None:
    with pytest.raises(UsageError, match="has a class 'liver_tumor' already"):
        add_class(model, "Liver tumour")


@pytest.mark.parametrize(("name", "prompt"), [("", None), (" ", None), ("psoas", ""), ("", "x")])
def test_a_class_without_a_word_is_refused(name: str, prompt: str | None) -> None:
    model = tiny_model()
    before = model.classes
    with pytest.raises(UsageError, match=r"needs a (name|prompt)"):
        model.add_class(name, prompt=prompt, embedding=torch.zeros(4), text=model.config.text)
    assert model.classes == before


@pytest.mark.parametrize("name", ["", "  "])
def test_a_class_needs_a_name(model: UniversalModel, no_encoder: None, name: str) -> None:
    with pytest.raises(UsageError, match="needs a name"):
        add_class(model, name)
    with pytest.raises(UsageError, match="needs a name"):
        add_classes(model, [ClassSpec(name, "A CT of nothing")])
    assert model.classes == tiny_model().classes


def test_another_name_of_a_known_class_is_a_class_of_its_own(
    model: UniversalModel, caplog: pytest.LogCaptureFixture
) -> None:
    model.add_class("liver lesion", embedding=torch.randn(MINILM.dim), text=MINILM)
    assert model.classes == (*tiny_model().classes, "liver lesion")
    assert caplog.messages == [
        "liver lesion is another name of liver_tumor, a class that the model has. It is added as a "
        "class of its own."
    ]


def test_a_parent_is_a_class_of_the_model_or_comes_with_it(model: UniversalModel) -> None:
    rows = torch.randn(2, MINILM.dim)
    psoas, abscess = ClassSpec("psoas", "A"), ClassSpec("psoas abscess", "B", "psoas")
    with pytest.raises(UsageError, match=r"parent of 'psoas abscess' must be.*Unknown class"):
        add_classes(model, [abscess], embeddings=rows[:1])
    own = replace(psoas, parent="Psoas")
    with pytest.raises(UsageError, match="parent of 'psoas' must be"):
        add_classes(model, [own], embeddings=rows[:1])
    assert model.classes == tiny_model().classes and len(model.prompt_embedding) == 3
    add_classes(model, [psoas, abscess], embeddings=rows)
    given = [ClassSpec("cyst", "C", "Hepatic"), ClassSpec("scar", "D", "Liver")]
    with pytest.raises(UsageError, match="parent of 'cyst'"):
        add_classes(model, given, embeddings=rows)
    add_classes(model, given[1:], embeddings=rows[:1])
    parents = [spec.parent for spec in model.config.classes[3:]]
    assert parents == [None, "psoas", "liver"], "by its own name"


def test_one_of_two_sides_is_enough_for_a_parent() -> None:
    model = from_pretrained("universal-ct")
    add_class(model, "cortical cyst", parent="kidney", embedding=torch.zeros(384), text=MINILM)
    assert model.config.classes[-1].parent == "kidney"


def test_one_hot_weights_take_a_class_where_a_place_is_left() -> None:
    tiny = tiny_model()
    spec = TextSpec(ONE_HOT, template="{}", pooling="none", normalised=True, dim=5)
    model = UniversalModel(replace(tiny.config, text=spec), torch.eye(3, 5)).eval()
    before = logits(model)
    add_class(model, "sacrum")
    add_class(model, "heart")
    assert torch.equal(model.prompt_embedding, torch.eye(5))
    torch.testing.assert_close(logits(model)[:, :3], before)
    assert not torch.equal(logits(model)[:, 3], logits(model)[:, 4]), "each is a class of its own"
    with pytest.raises(UsageError, match=r"0 places left for 1 more.*model\.spare_places=1"):
        add_class(model, "femur")
