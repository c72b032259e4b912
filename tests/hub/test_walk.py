"""The way of an adapter, as a user goes it: add-class, segment, push, load, merge, save."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hub_server import HubServer

from foundation import from_pretrained
from foundation.cli.main import main
from foundation.hub.adapter_files import read_config
from foundation.hub.load import model_card
from foundation.hub.saved import save_pretrained
from foundation.synthesis import SMOKE_CLASS, write_scans

pytest.importorskip("peft")


@pytest.mark.slow
def test_from_adding_a_class_to_a_model_of_its_own(server: HubServer, tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "scans", 3)
    run, ct = tmp_path / "run", scans / "generated_0" / "ct.nii.gz"
    learn = ["add-class", SMOKE_CLASS, "--data", str(scans), "--method", "lora", "--steps", "2"]
    assert main([*learn, "-o", str(run), "-q"]) == 0

    config = read_config(run / "adapter")
    assert (config.name, config.base, config.base_source) == (SMOKE_CLASS, *["universal-ct"] * 2)
    wanted = [SMOKE_CLASS, "colon"]
    volumes = []
    for number, model in enumerate((run / "adapter", run)):
        output = tmp_path / f"masks{number}"
        command = ["segment", str(ct), "-m", str(model), "-c", *wanted, "-o", str(output), "-q"]
        assert main(command) == 0
        masks = [np.asarray(nib.load(file).dataobj) for file in sorted(output.rglob("*.nii.gz"))]
        volumes.append([int(mask.sum()) for mask in masks])
    assert volumes[0] == volumes[1] and len(volumes[0]) >= 1

    model = from_pretrained(run)
    assert model.classes[-1] == SMOKE_CLASS and len(model.classes) == 33
    url = model.push_adapter("lab/sacrum", token="hf_tests")
    assert "/lab/sacrum/commit/" in url
    card = model_card("lab/sacrum")
    assert (card.metadata["base_model"], card.metadata["license"]) == ("universal-ct", "other")

    pulled = from_pretrained("lab/sacrum")
    merged = pulled.merge_adapter()
    assert merged.config == replace(pulled.config, name="universal-ct-sacrum")
    saved = save_pretrained(merged, tmp_path / "merged", dtype=torch.float16)
    own = json.loads((saved / "config.json").read_text())
    assert own["name"] == "universal-ct-sacrum" and len(own["classes"]) == 33
    card = model_card(saved)
    assert card.metadata["base_model_relation"] == "finetune"
    image = torch.linspace(0, 1, 2 * 64**3).view(1, 2, 64, 64, 64)
    with torch.no_grad():
        given, expected = from_pretrained(saved)(image), pulled(image)
    torch.testing.assert_close(given, expected, atol=0.2, rtol=0.01)
