"""Scans that a model was trained on are found by the record of its training data."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from dataset_trees import TREES

from foundation.data import Case, get_dataset
from foundation.files import file_sha256
from foundation.hub.cards import cards_folder
from foundation.pretraining import TrainedOn, read_folds, trained_on
from foundation.pretraining.run import CONFIG, FOLDS


def cases(*ids: str) -> list[Case]:
    return [Case(id_, None, ()) for id_ in ids]


@pytest.mark.parametrize("dataset", ["15", "15_v2"])
def test_the_embedded_weights_saw_scans_of_totalsegmentator(dataset: str) -> None:
    trained = trained_on("universal-ct")
    assert trained is not None
    scans = cases("s0001", "s0002", "s0327", "s0328", "s0329", "s0335")
    seen = trained.among(get_dataset(dataset), scans)
    # s0335 has the weight 0: it was never drawn. Crop 0002 may be s0002, so that is left out too.
    assert seen == {
        "s0002": "open-data/totalsegmentator_crops_0002",
        "s0327": "open-data/totalsegmentator_s0327",
        "s0328": "open-data/totalsegmentator_s0328",
    }
    assert trained.among(get_dataset("06"), cases("1", "2", "327")) == {}


def test_the_record_is_the_manifest_beside_the_card() -> None:
    path = cards_folder() / "universal-ct.manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))["cases"]
    trained = trained_on("universal-ct")
    assert trained is not None
    drawn = {key for key, entry in manifest.items() if entry["weight"] > 0}
    assert set(trained.cases) == drawn < set(manifest)


def test_nothing_is_known_of_weights_that_others_published(tmp_path: Path) -> None:
    assert trained_on("universal-ct-unet") is None
    assert trained_on(tmp_path) is None


def test_lits_and_msd_liver_are_the_same_scans() -> None:
    trained = TrainedOn({"04/5": {}})
    assert trained.among(get_dataset("10_03"), cases("liver_5", "liver_6")) == {"liver_5": "04/5"}
    assert trained.among(get_dataset("05"), cases("5")) == {}


def test_a_copied_file_is_recognised(tmp_path: Path) -> None:
    TREES["04"](tmp_path)
    dataset = get_dataset("04")
    first, second = dataset.find(tmp_path)
    assert first.image is not None
    file = {"bytes": first.image.stat().st_size, "sha256": file_sha256(first.image)}
    trained = TrainedOn({"mine/patient": {"sources": [file]}})
    assert trained.among(dataset, [first, second]) == {first.id: "mine/patient"}


def test_a_run_saw_what_it_did_not_hold_out(unbroken: Path, store: Path, tmp_path: Path) -> None:
    every = set(json.loads((store / "manifest.json").read_text())["cases"])
    whole = trained_on(unbroken / "model")
    assert whole is not None and set(whole.cases) == every, "nothing was held out"
    config = yaml.safe_load((unbroken / CONFIG).read_text())
    config["validation"]["fold"] = 1
    (tmp_path / CONFIG).write_text(yaml.safe_dump(config))
    shutil.copyfile(unbroken / FOLDS, tmp_path / FOLDS)
    trained = trained_on(tmp_path / "model")
    held_out = read_folds(unbroken / FOLDS).cases(1)
    assert trained is not None and held_out
    assert set(trained.cases) == every - held_out


def test_what_a_run_started_from_was_seen_too(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    config = yaml.safe_load((run / CONFIG).read_text())
    own = trained_on(run / "model")
    assert own is not None

    def started_from(name: str) -> TrainedOn | None:
        (run / CONFIG).write_text(yaml.safe_dump({**config, "initialise_from": name}))
        return trained_on(run / "model")

    both = started_from("universal-ct")
    assert both is not None and set(own.cases) < set(both.cases)
    assert "open-data/totalsegmentator_s0327" in both.cases
    assert started_from("universal-ct-unet") is None, "what that one saw is not known"
