"""Cards: they parse, the Hub's own client reads them, and they agree with the weights."""

import pytest
from huggingface_hub import ModelCard
from tiny import tiny_model

from foundation.config import ModelConfig
from foundation.errors import HubError, WeightsError
from foundation.hub.cards import Card, card_names, list_models, read_card
from foundation.hub.convert import published_config
from foundation.hub.folder import CONFIG
from foundation.hub.new_cards import generate_card
from foundation.model import UniversalModel
from foundation.taxonomy import CLASSES

CARDS = [read_card(name) for name in card_names()]
PUBLISHED = [card for card in CARDS if card.source is not None]
EMBEDDED = [card for card in CARDS if card.source is None]


def parameters(config: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in UniversalModel(config).parameters())


def test_the_known_models() -> None:
    assert card_names() == ("universal-ct", "universal-ct-swin-unetr", "universal-ct-unet")
    sources = {card.name: (card.source.repo, card.source.file) for card in PUBLISHED if card.source}
    repo = "ljwztc/CLIP-Driven-Universal-Model"
    assert sources == {
        "universal-ct-unet": (repo, "clip_driven_universal_unet.pth"),
        "universal-ct-swin-unetr": (repo, "clip_driven_universal_swin_unetr.pth"),
    }


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_front_matter_is_what_the_hub_expects(card: Card) -> None:
    data = ModelCard(card.render(), ignore_metadata_errors=False).data
    assert data.pipeline_tag == "image-segmentation"
    assert data.library_name == "universal-ct"
    assert "dice" in data.metrics
    assert data.license == card.licence
    assert data.model_name == card.name
    assert ("source" in card.weights) != card.weights.get("embedded", False)
    assert "Not a medical device" in card.text
    assert card.text.startswith(f"# {card.name}\n")


@pytest.mark.parametrize("card", PUBLISHED, ids=lambda card: card.name)
def test_cards_of_published_weights_agree_with_them(card: Card) -> None:
    config = published_config(card.weights["backbone"])
    assert card.weights["parameters"] == parameters(config)
    assert card.weights["classes"] == len(config.classes) == len(CLASSES)
    assert card.licence == config.licence == "cc-by-nc-nd-4.0"
    assert "CC BY-NC-ND 4.0" in card.text and "CC BY-NC-ND 4.0" in config.licence_notice


@pytest.mark.parametrize("card", EMBEDDED, ids=lambda card: card.name)
def test_cards_of_embedded_weights_agree_with_them(card: Card) -> None:
    config = ModelConfig.from_json((card.folder / CONFIG).read_text())
    assert config.name == card.name
    assert card.weights["backbone"] == config.backbone
    assert card.weights["classes"] == len(config.classes)
    assert card.weights["parameters"] == parameters(config)
    assert card.licence == config.licence == "apache-2.0"
    assert card.metadata["model-index"][0]["results"], "the measured agreement belongs here"


def test_list_models_tells_where_the_weights_are() -> None:
    models = {model.name: model for model in list_models()}
    assert models["universal-ct"].where == "embedded"
    assert models["universal-ct-unet"].where.startswith("ljwztc/")
    assert models["universal-ct-unet"].size_mb is None
    assert models["universal-ct-unet"].parameters == 19_416_417


def test_unknown_card() -> None:
    with pytest.raises(HubError, match=r"Did you mean 'universal-ct-unet'.*universal-ct models"):
        read_card("universal-ct-unt")


@pytest.mark.parametrize(
    ("markdown", "message"),
    [
        ("# No front matter\n", "no front matter"),
        ("---\nlicense: mit\n", "no front matter"),
        ("---\n- mit\n---\n", "not a mapping"),
        ("---\nlicense: [mit\n---\n", "not YAML"),
    ],
)
def test_bad_front_matter(markdown: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        Card.parse("x", markdown, "x.md")


def test_card_without_our_fields_cannot_be_listed() -> None:
    card = Card("x", {"universal_ct": {"summary": "", "backbone": "unet", "classes": 1}}, "")
    with pytest.raises(WeightsError, match="'parameters'"):
        card.summary()


def test_render_and_parse_are_inverse() -> None:
    for card in CARDS:
        assert Card.parse(card.name, card.render(), "x") == card


@pytest.mark.parametrize("licence", ["apache-2.0", "hospital-agreement-7"])
def test_generated_card_states_facts(licence: str) -> None:
    config = tiny_model(licence=licence).config
    card = generate_card(config, 1234, {"config.json": "ab" * 32})
    assert Card.parse("tiny", card.render(), "x") == card
    assert card.licence == licence
    assert (card.metadata["license"] == "other") == (licence != "apache-2.0")
    assert card.weights["parameters"] == 1234
    assert "| 2 | liver_tumor | A CT of a liver tumor | liver |" in card.text
    assert "10200004" in card.text, "the liver's SNOMED CT code"
    assert "ab" * 32 in card.text
    assert "-175 to 250 HU" in card.text and "1.5 × 1.5 × 1.5 mm" in card.text
    assert ModelCard(card.render()).data.model_name == "tiny"
