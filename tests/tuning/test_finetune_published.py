"""A model of the published format takes new classes as the embedded one does."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published import published_state
from tuning_trees import write_folders

from foundation import from_pretrained
from foundation.adapting import classes as prompts
from foundation.config import Preprocessing
from foundation.data.naming import NewClass
from foundation.hub.load import load_adapter
from foundation.model import UniversalModel
from foundation.tuning.finetune import finetune

QUICK = {"steps": 2, "validate_every": 2, "voxels": 500, "windows": 2, "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> UniversalModel:
    """The converted checkpoint; small patches at 4 mm, since the scans of the test are small."""
    path = tmp_path_factory.mktemp("published") / "mine.pth"
    torch.save({"net": published_state("unet")}, path)
    loaded = from_pretrained(path)
    windows = loaded.config.preprocessing.hu_windows
    small = Preprocessing(spacing_mm=(4.0,) * 3, hu_windows=windows, patch_size=(16, 16, 16))
    loaded.config = replace(loaded.config, preprocessing=small)
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("method", ["head", "lora", "full", "continual"])
def test_a_class_is_added_to_published_weights(
    method: str, model: UniversalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CLIP's own weights cannot be had in a test; a vector of its size stands for what it says.
    monkeypatch.setattr(prompts, "encode_prompts", lambda text, said: torch.ones(len(said), 512))
    image = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(image)
    scans = write_folders(tmp_path / "scans", cases=2)
    wanted = [NewClass("vertebra L1")]
    options = QUICK if method == "head" else {**QUICK, "probe": 2}
    tuned = finetune(
        *(model, scans, wanted), output=tmp_path / "run", method=method, device="cpu", **options
    )  # type: ignore[arg-type]
    assert tuned.model.classes == (*model.classes, "vertebra L1")
    assert tuned.model.config.licence == "cc-by-nc-nd-4.0"
    if method == "lora":
        again = copy.deepcopy(model)
        load_adapter(again, tuned.saved)
    else:
        again = from_pretrained(tuned.saved)
    with torch.no_grad():
        after, kept = again(image), tuned.model(image)
    assert after.shape[1] == 33
    torch.testing.assert_close(after, kept, rtol=0.02, atol=0.2)  # stored in half precision
    if method == "head":
        assert torch.equal(kept[:, :32], before)
