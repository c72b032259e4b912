"""The agreement benchmark: labels become classes, and a run leaves a record."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import REPOSITORY

from foundation.errors import UsageError
from foundation.evaluation import path_sha256, read_records, reference_of, renamed
from foundation.taxonomy import NAMES

SCRIPT = str(REPOSITORY / "benchmarks" / "agreement.py")


def test_labels_are_joined_to_classes(tmp_path: Path) -> None:
    label_map = np.array([0, 1, 2, 3, 0, 5, 6, 0], np.uint8).reshape(2, 2, 2)
    nib.save(nib.Nifti1Image(label_map, np.eye(4)), tmp_path / "labels.nii.gz")
    names = {"1": "lung_upper_lobe_left", "2": "lung_lower_lobe_left", "3": "vertebrae_L1"}
    names |= {"5": "small_bowel", "6": "lung_nodule"}
    (tmp_path / "labels.json").write_text(json.dumps(names))
    expected = {"lung_left": [1, 2], "intestine": [5]}
    nodule = {"lung_tumor": [6], "lung_left": [1, 2, 6]}  # a lesion belongs to its organ too
    for also, more in ((None, {}), ({"lung_nodule": "lung_tumor"}, nodule)):
        reference = reference_of(tmp_path / "labels.nii.gz", also)
        known = [name for name in reference.classes if name in NAMES]
        found = {name: np.flatnonzero(reference.mask(name)).tolist() for name in known}
        assert found == expected | more


def test_a_cyst_of_one_side_is_the_whole_cyst(tmp_path: Path) -> None:
    label_map = np.array([0, 1, 1, 2, 0, 0, 0, 0], np.uint8).reshape(2, 2, 2)
    nib.save(nib.Nifti1Image(label_map, np.eye(4)), tmp_path / "labels.nii.gz")
    names = {"1": "kidney_left", "2": "kidney_cyst_left"}  # of the right one nothing is listed
    (tmp_path / "labels.json").write_text(json.dumps(names))
    reference = reference_of(tmp_path / "labels.nii.gz")
    assert np.flatnonzero(reference.mask("kidney_cyst")).tolist() == [3]


def test_other_names_of_labels() -> None:
    assert renamed("a=liver, b=spleen") == {"a": "liver", "b": "spleen"}
    assert renamed("") == {}
    with pytest.raises(UsageError, match="label=class"):
        renamed("liver")


@pytest.mark.slow
def test_a_run_leaves_a_record(tmp_path: Path) -> None:
    case = tmp_path / "case"
    case.mkdir()
    hu = np.full((24, 24, 24), -1000, np.int16)
    hu[4:20, 4:20, 4:20] = 60
    nib.save(nib.Nifti1Image(hu, np.diag([6, 6, 6, 1])), case / "ct.nii.gz")
    labels = np.zeros(hu.shape, np.uint8)
    labels[8:14, 8:14, 8:14] = 1
    nib.save(nib.Nifti1Image(labels, np.diag([6, 6, 6, 1])), case / "labels.nii.gz")
    (case / "labels.json").write_text(json.dumps({"1": "liver", "2": "spleen"}))
    record = tmp_path / "records.jsonl"
    command = [sys.executable, SCRIPT, "ct.nii.gz", "labels.nii.gz", "--record", str(record)]
    done = subprocess.run(command, cwd=case, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (measured,) = read_records(record)
    assert "| spleen | not in the labels |" in done.stderr
    assert measured.figure("reference/liver").value == pytest.approx(6**3 * 0.216)
    assert measured.figure("dice/spleen").value is None
    assert measured.data["case/ct.nii.gz"] == path_sha256(case / "ct.nii.gz")
    assert set(measured.weights) == {
        "config.json",
        "model.safetensors",
        "prompt_embedding.safetensors",
    }
    assert "--record" not in measured.command


@pytest.mark.slow
def test_only_embedded_weights_have_a_card_here() -> None:
    command = [sys.executable, SCRIPT, "ct", "labels", "-m", "runs/mine", "--card"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "use --record" in done.stderr
