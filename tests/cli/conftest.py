"""Fixtures of the tests of the command line."""

from dataclasses import replace

import pytest
from tiny import tiny_model

from foundation.hub.saved import save_pretrained
from foundation.model import UniversalModel


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of three classes at 12 mm: a segmentation takes a moment."""
    tiny = tiny_model()
    coarse = replace(tiny.config.preprocessing, spacing_mm=(12.0, 12.0, 12.0))
    model = UniversalModel(replace(tiny.config, preprocessing=coarse), tiny.prompt_embedding)
    model.load_state_dict(tiny.state_dict())
    return str(save_pretrained(model, tmp_path_factory.mktemp("models") / "tiny"))
