"""Masking against background: what is declared, and both experiments on trees in real layouts."""

import json
from pathlib import Path

import pytest
from benchmark_scripts import script
from dataset_trees import TREES
from real_layouts import records, run_real

from foundation import get_dataset

masked_loss = script("masked_loss")


def annotated(store: Path) -> dict[str, set[str]]:
    cases = json.loads((store / "manifest.json").read_text(encoding="utf-8"))["cases"]
    return {key: set(case["annotated"]) for key, case in cases.items()}


def test_as_background_every_class_counts_as_labelled_in_every_case(tmp_path: Path) -> None:
    TREES["01"](tmp_path / "BTCV")
    TREES["04"](tmp_path / "LiTS")
    given = [(name, str(tmp_path / folder)) for name, folder in (("01", "BTCV"), ("04", "LiTS"))]
    union = {*get_dataset("01").annotated, "liver_tumor"}
    for dataset, root in masked_loss.as_background(given):
        cases = dataset.find(root)
        # Case 61 of BTCV has 8 of 14 organs by the dataset's own rule.
        assert len(cases) == 2 and all(set(case.annotated) == union for case in cases)
        assert dataset.label_map == get_dataset(dataset.id).label_map, "no label means another"
    few = {len(case.annotated) for case in get_dataset("01").find(tmp_path / "BTCV")}
    assert few == {8, 14}, "the datasets themselves are as they were"


@pytest.mark.slow
def test_both_arms_on_btcv_lits_and_msd_lung(tmp_path: Path) -> None:
    TREES["01"](tmp_path / "BTCV")
    TREES["04"](tmp_path / "LiTS")
    TREES["10_06"](tmp_path / "MSD")
    folders = {"01": "BTCV", "04": "LiTS", "10_06": "MSD"}
    out = tmp_path / "out"
    run_real("masked_loss.py", out, *(f"{k}={tmp_path / v}" for k, v in folders.items()))
    arms = {str(record.arm["unlabelled"]): record for record in records(out)}
    assert arms.keys() == {"masked", "background"}
    names = [{figure.name for figure in record.figures} for record in arms.values()]
    assert names[0] == names[1], "both are measured by what is truly labelled"
    masked, background = annotated(out / "store"), annotated(out / "store-background")
    assert masked.keys() == background.keys()
    assert masked["04/2"] == {"liver", "liver_tumor"}
    assert all(names == set.union(*masked.values()) for names in background.values())
    folds = [(run / "training" / "folds.json").read_text() for run in (out / "runs").iterdir()]
    assert len(folds) == 2 and folds[0] == folds[1], "both hold the same scans out"


@pytest.mark.slow
def test_table_8_on_lits_and_msd_lung(tmp_path: Path) -> None:
    TREES["04"](tmp_path / "LiTS")
    TREES["10_06"](tmp_path / "MSD")
    given = [f"04={tmp_path / 'LiTS'}", f"10_06={tmp_path / 'MSD'}"]
    run_real("table8_backbones.py", tmp_path / "out", *given, "--only", "backbone=lite_unet")
    (record,) = records(tmp_path / "out")
    assert record.arm == {"backbone": "lite_unet"} and record.size == "real"
    assert record.figure("dice/mean").n and record.figure("seconds a step").value > 0
