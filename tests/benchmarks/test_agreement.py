"""The agreement benchmark: labels become classes, numbers reach the card."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
from conftest import REPOSITORY

from foundation.hub.cards import read_card


@pytest.fixture(scope="module")
def agreement() -> ModuleType:
    path = REPOSITORY / "benchmarks" / "agreement.py"
    spec = importlib.util.spec_from_file_location("agreement", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["agreement"] = module
    spec.loader.exec_module(module)
    return module


def test_labels_are_joined_to_classes(agreement: ModuleType, tmp_path: Path) -> None:
    label_map = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    nib.save(nib.Nifti1Image(label_map, np.eye(4)), tmp_path / "labels.nii.gz")
    names = {"1": "lung_upper_lobe_left", "2": "lung_lower_lobe_left", "3": "vertebrae_L1"}
    (tmp_path / "labels.json").write_text(json.dumps({**names, "5": "small_bowel"}))
    masks = agreement.reference_masks(tmp_path / "labels.nii.gz")
    assert {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()} == {
        "lung_left": [1, 2],
        "intestine": [5],
    }


def test_the_card_receives_the_numbers(agreement: ModuleType, tmp_path: Path) -> None:
    card = tmp_path / "universal-ct.md"
    card.write_text(read_card("universal-ct").render(), encoding="utf-8")
    classes = {
        "liver": {"dice": 0.912, "volume_ml": 1500.0, "reference_ml": 1480.0},
        "esophagus": {"dice": None, "volume_ml": 0.0, "reference_ml": 0.0},
    }
    result = {
        "reference": "Against machine labels",
        "dataset": "some scan",
        "command": "the command",
        "date": "2026-01-02",
        "machine": "a machine",
        "classes": classes,
        "present": 1,
        "mean": 0.912,
        "target_mean": 0.5,
    }
    for _ in range(2):  # writing it again changes nothing
        agreement.write_card(card, result)
    text = card.read_text(encoding="utf-8")
    assert text.count("| liver | 0.912 | 1500 | 1480 |") == 1
    assert "| esophagus | not in the labels | 0 | 0 |" in text
    assert text.count("## Limits") == text.count("## Results") == 1
    assert "name: Dice agreement, liver" in text and "value: 0.912" in text
    assert "Dice agreement, esophagus" not in text
