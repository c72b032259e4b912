"""Encoders that cannot be had: named and left out, or an error in the real size."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_scripts import script

from foundation import TEXT_ENCODERS, HubError, UsageError

encoders = script("encoders")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(names: list[str], spec: Any) -> torch.Tensor:
        if spec is TEXT_ENCODERS["minilm"]:
            return torch.zeros(len(names), spec.dim)
        raise HubError(f"{spec.encoder} cannot be loaded\nmore")

    encoders.class_embeddings.cache_clear()
    monkeypatch.setattr(encoders, "embed_classes", embed)
    yield
    encoders.class_embeddings.cache_clear()


def lab(size: str, **given: Any) -> Any:
    return SimpleNamespace(
        size=size, given=SimpleNamespace(**{"only": [], "skip_missing": False, **given})
    )


def test_every_encoder_of_a_training_has_a_name() -> None:
    assert {*encoders.ENCODERS.values()} == {*TEXT_ENCODERS, "one-hot"}


def test_what_cannot_be_had_is_named_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    every = list(encoders.ENCODERS)
    assert encoders.at_hand(lab("mini"), every) == ["one-hot", "MiniLM"]
    said = capsys.readouterr().err
    assert all(f"{name} is left out: " in said for name in ("CLIP", "BioBERT", "BioLinkBERT"))
    assert encoders.at_hand(lab("real", skip_missing=True), every) == ["one-hot", "MiniLM"]


def test_the_real_size_leaves_nothing_out_unasked() -> None:
    with pytest.raises(UsageError, match=r"CLIP: .*copy its cache here; or give --skip-missing"):
        encoders.at_hand(lab("real"), ["one-hot", "CLIP"])


def test_only_the_arm_that_is_asked_for_is_loaded() -> None:
    assert encoders.at_hand(lab("real", only=["text=MiniLM"]), ["MiniLM", "CLIP"]) == ["MiniLM"]
    with pytest.raises(UsageError, match="no such arm; give MiniLM, CLIP"):
        encoders.at_hand(lab("real", only=["text=BERT"]), ["MiniLM", "CLIP"])
