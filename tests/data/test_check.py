"""`universal-ct datasets`: the list, and a check that names each fault of a broken tree."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dataset_trees import (
    DICOM_AFFINE,
    TREES,
    Expected,
    copy_tree,
    make_affine,
    make_ct,
    make_labels,
    write_dicom,
    write_nifti,
)

from foundation.cli import datasets as command
from foundation.data import check_dataset, get_dataset, paper_datasets
from foundation.errors import MissingExtraError, UsageError

SIDES = (40, 30, 20)  # voxels of 5 mm, in RAS: x runs to the right
AFFINE = np.diag([5.0, 5, 5, 1])


def rewrite(path: Path, change) -> None:
    """Put `change(voxels)` in place of a NIfTI file's voxels."""
    image = nib.load(path)
    write_nifti(path, change(np.asanyarray(image.dataobj).copy()), image.affine)


def move(path: Path) -> None:
    image = nib.load(path)
    affine = image.affine.copy()
    affine[:3, 3] += 4
    write_nifti(path, np.asanyarray(image.dataobj), affine)


def tilt(folder: Path) -> None:
    """Shift the slices against each other, and the labels with them."""
    affine = DICOM_AFFINE.copy()
    affine[1, 2] = 0.6
    write_dicom(folder, make_ct(0), affine)
    labels = next(folder.parents[3].glob("*/label0001.nii.gz"))
    turn = np.linalg.inv(DICOM_AFFINE) @ nib.load(labels).affine
    write_nifti(labels, np.asanyarray(nib.load(labels).dataobj), affine @ turn)


# A fault: dataset, how to bring it about, words that must name it.
FAULTS = {
    "an image without label": (
        "01",
        lambda root, case: case.labels.unlink(),
        r"^0001: no label for the image .*img0001\.nii\.gz",
    ),
    "a label without image": (
        "01",
        lambda root, case: case.image.unlink(),
        r"^0001: no image for the label .*label0001\.nii\.gz",
    ),
    "a file that the index names is not there": (
        "10_03",
        lambda root, case: case.labels.unlink(),
        r"^liver_2: no label: .*does not exist",
    ),
    "labels of another shape": (
        "04",
        lambda root, case: rewrite(case.labels, lambda v: v[:, :-1]),
        r"^2: unusable labels: .*not on the grid of its image: shape 9×7×6, not 9×8×6",
    ),
    "labels elsewhere in the body": (
        "04",
        lambda root, case: move(case.labels),
        r"^2: unusable labels: .*not on the grid of its image: centre",
    ),
    "a label that nobody knows": (
        "04",
        lambda root, case: rewrite(case.labels, lambda v: np.where(v == 2, 7, v)),
        r"^2: label values that are not in the label map: 7; known are 1, 2",
    ),
    "labels that were interpolated": (
        "04",
        lambda root, case: rewrite(case.labels, lambda v: v * 0.5),
        r"^2: unusable labels: .*holds 0\.5: labels are whole numbers",
    ),
    "empty labels": (
        "05",
        lambda root, case: rewrite(case.labels, np.zeros_like),
        r"^case_00000: empty labels",
    ),
    "an image that is no CT": (
        "08",
        lambda root, case: rewrite(case.image, lambda v: v - v.min()),
        r"^00001: image not in HU\? .*never negative: an MR",
    ),
    "a windowed image": (
        "08",
        lambda root, case: rewrite(case.image, lambda v: np.clip(v, -175, 250)),
        r"^00001: image not in HU\? .*already windowed",
    ),
    "a damaged image": (
        "13",
        lambda root, case: case.image.write_bytes(case.image.read_bytes()[:-20]),
        r"^0001: unreadable image: .*damaged or cut short",
    ),
    "damaged labels": (
        "13",
        lambda root, case: case.labels.write_bytes(b"not gzip"),
        r"^0001: unusable labels: ",
    ),
    "a case that is there twice": (
        "12",
        lambda root, case: write_nifti(root / "copy" / case.image.name, make_ct(1), make_affine(1)),
        r"^0: duplicate id: its image is .*copy.*Keep one",
    ),
    "a lost slice": (
        "02",
        lambda root, case: sorted(case.image.iterdir())[2].unlink(),
        r"^0001: unreadable image: .*slices are missing between",
    ),
    "a patient with two series": (
        "02",
        lambda root, case: write_dicom(case.image.with_name("other"), make_ct(9), series="7.7"),
        r"^0001: duplicate id: its image is ",
    ),
    "an MR in place of the CT": (
        "02",
        lambda root, case: write_dicom(case.image, make_ct(0), modality="MR"),
        r"^0001: image not in HU\? .* is MR by its DICOM headers",
    ),
    "a lost mask": (
        "03",
        lambda root, case: (case.labels / "liver_GT_002.png").unlink(),
        r"^1: unusable labels: .*holds 5 masks for 6 slices",
    ),
    "a damaged mask": (
        "03",
        lambda root, case: (case.labels / "liver_GT_002.png").write_bytes(b"?"),
        r"^1: unusable labels: .*liver_GT_002\.png is damaged",
    ),
    "a lost slice of a mask": (
        "06",
        lambda root, case: (case.labels / "liver/image_3").unlink(),
        r"^1: unusable labels: .*liver lacks the masks of 1 slices: image_3",
    ),
    "a tilted gantry": (
        "02",
        lambda root, case: tilt(case.image),
        r"^0001: unusable geometry: its axes are not square to each other \(up to 13° off\)",
    ),
    "a structure without mask": (
        "15",
        lambda root, case: (case.labels / "spleen.nii.gz").unlink(),
        r"^s0011: missing labels: there is no mask of spleen",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(fault, tmp_path):
    dataset, break_it, words = FAULTS[fault]
    first: Expected = TREES[dataset](tmp_path)[0]
    break_it(tmp_path, first)
    report = check_dataset(get_dataset(dataset), tmp_path)
    assert len(report.faults) == 1, report.faults
    assert re.search(words, report.faults[0]), report.faults[0]


def body(labels: dict[int, tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """A trunk in air, and balls of 20 mm as organs: label → centre, mm right, front, up of it."""
    x, y, z = np.meshgrid(*(5.0 * (np.arange(n) - (n - 1) / 2) for n in SIDES), indexing="ij")
    ct = np.where((x / 90) ** 2 + (y / 65) ** 2 < 1, 40, -1000).astype(np.int16)
    label_map = np.zeros(SIDES, np.uint8)
    for label, (right, front, up) in labels.items():
        label_map[(x - right) ** 2 + (y - front) ** 2 + (z - up) ** 2 < 20**2] = label
    return ct, label_map


SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, LIVER = 1, 2, 3, 6  # BTCV's numbers
HEALTHY = {
    SPLEEN: (-60, 0, 20),
    RIGHT_KIDNEY: (40, -30, -20),
    LEFT_KIDNEY: (-40, -30, -20),
    LIVER: (50, 20, 20),
}


def faults_of(tmp_path: Path, organs, affine=AFFINE) -> list[str]:
    ct, labels = body(organs)
    write_nifti(tmp_path / "img/img0001.nii.gz", ct, affine)
    write_nifti(tmp_path / "label/label0001.nii.gz", labels, affine)
    return check_dataset(get_dataset("01"), tmp_path).faults


def test_organs_on_their_sides_are_no_fault(tmp_path):
    assert faults_of(tmp_path, HEALTHY) == []


def test_swapped_sides_are_a_fault(tmp_path):
    swapped = {**HEALTHY, RIGHT_KIDNEY: HEALTHY[LEFT_KIDNEY], LEFT_KIDNEY: HEALTHY[RIGHT_KIDNEY]}
    (fault,) = faults_of(tmp_path, swapped)
    assert fault.startswith("0001: kidney_right lies left of kidney_left")


def test_a_single_organ_beyond_the_middle_is_a_fault(tmp_path):
    organs = {key: place for key, place in HEALTHY.items() if key != RIGHT_KIDNEY}
    assert faults_of(tmp_path, organs) == []
    (fault,) = faults_of(tmp_path, {**organs, LEFT_KIDNEY: (40, -30, -20)})
    assert fault == "0001: kidney_left lies 40 mm beyond the middle of the body, on the other side."


def test_a_mirrored_scan_is_a_fault(tmp_path):
    faults = faults_of(tmp_path, HEALTHY, np.diag([-5.0, 5, 5, 1]))
    assert len(faults) == 2
    assert "kidney_right lies left of kidney_left" in faults[0]
    assert "the liver lies left of the spleen: the scan is mirrored" in faults[1]


def test_the_report_counts_what_is_there(tmp_path):
    faults_of(tmp_path, HEALTHY)
    report = check_dataset(get_dataset("01"), tmp_path)
    _, labels = body(HEALTHY)
    assert report.classes["liver"] == (1, (labels == LIVER).sum())
    assert list(report.classes) == ["spleen", "kidney_right", "kidney_left", "liver"]
    assert report.orientations == {"RAS": 1}
    assert report.ranges()["spacing x (mm)"] == (5, 5)
    assert report.ranges()["HU (0.5 % to 99.5 %)"] == (-1000, 40)
    assert report.notes == [
        "labels read: 1 as spleen, 2 as kidney_right, 3 as kidney_left, 6 as liver",
        "annotated, but in no case: gallbladder, esophagus, stomach, aorta, inferior_vena_cava, "
        "portal_vein_and_splenic_vein, pancreas, adrenal_gland_right, adrenal_gland_left, duodenum",
    ]


def test_a_merged_pair_is_counted_as_its_organ(tmp_path):
    expected = TREES["05"](tmp_path)
    report = check_dataset(get_dataset("KiTS"), tmp_path)
    merged = sum(mask.sum() for each in expected for mask in each.masks.values())
    assert report.classes["kidney"] == (2, merged)  # with its tumours and cysts
    assert set(report.classes) == {"kidney", "kidney_tumor", "kidney_cyst"}
    assert report.notes == [
        "labels read: 1 as kidney_right and kidney_left, 2 as kidney_tumor, 3 as kidney_cyst"
    ]


def test_duplicate_cases_in_different_folders_are_no_case(tmp_path):
    TREES["04"](tmp_path)
    copy_tree(tmp_path / "Training Batch 1", tmp_path / "Training Batch 1 (1)")
    report = check_dataset(get_dataset("04"), tmp_path)
    assert [case.id for case in report.cases] == ["10"]
    assert report.faults[0].startswith("2: duplicate id")


# --- the command line ----------------------------------------------------------------------------


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser.add_subparsers(dest="verb"))
    return command.run(parser.parse_args(["datasets", *map(str, words)]))


def test_the_list_names_every_dataset(capsys):
    assert run() == 0
    text = capsys.readouterr().out
    assert all(dataset.name in text for dataset in paper_datasets().values())
    assert run("--json") == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(paper_datasets())
    assert (rows["04"]["cases_in_paper"], rows["04"]["cases_used"]) == (201, 131)
    assert rows["10_03"]["licence"] == "CC-BY-SA-4.0"
    assert all(row["url"] or row["obtain"] for row in rows.values())
    assert (
        sum(row["cases_used"] or 0 for row in rows.values()) == 2995
    )  # as many as the published lists


def test_a_sound_folder_exits_with_0(tmp_path, capsys):
    TREES["04"](tmp_path)
    assert run("check", "LiTS", tmp_path, "-q") == 0
    text = capsys.readouterr().out
    assert "LiTS: 2 cases" in text and "No fault found." in text and "liver_tumor" in text


def test_a_faulty_folder_exits_with_1_and_says_why(tmp_path, capsys):
    case = TREES["04"](tmp_path)[0]
    case.labels.unlink()
    assert run("check", "04", tmp_path) == 1
    assert "1 faults:\n  2: no label for the image" in capsys.readouterr().out
    assert run("--json", "check", "04", tmp_path) == run("check", "04", tmp_path, "--json") == 1
    decoder = json.JSONDecoder()
    content, _ = decoder.raw_decode(capsys.readouterr().out)
    assert content["faults"][0].startswith("2: no label")
    assert content["classes"]["liver"]["cases"] == 1


def test_nnu_nets_index_or_its_folder_is_enough(tmp_path, capsys):
    root = tmp_path / "Dataset7_Mine"
    write_nifti(root / "imagesTr/x_1_0000.nii.gz", make_ct(0), make_affine(0))
    write_nifti(root / "labelsTr/x_1.nii.gz", make_labels(0, (1,)), make_affine(0))
    (root / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1}}')
    for words in ((root,), (root / "dataset.json",), (root / "dataset.json", root)):
        assert run("check", *words) == 0
        text = capsys.readouterr().out
        assert "Dataset7_Mine: 1 cases read" in text
        assert "note: labels read: 1 as liver" in text
    with pytest.raises(UsageError, match="Where does LiTS lie"):
        run("check", "LiTS")


def test_labels_that_are_read_and_ignored_are_listed(tmp_path):
    TREES["12"](tmp_path)
    notes = check_dataset(get_dataset("12"), tmp_path).notes
    assert notes[0].startswith("labels read: 1 as liver, 2 as urinary_bladder, 3 as lung_right and")
    assert notes[1] == "labels ignored, of no class: 5, 6"


def test_wrong_use_is_told(tmp_path):
    with pytest.raises(UsageError, match="No case of LiTS"):
        run("check", "04", tmp_path)
    with pytest.raises(UsageError, match="--limit is 0"):
        run("check", "04", tmp_path, "--limit", "0")


def test_the_first_cases_alone_can_be_checked(tmp_path, capsys):
    TREES["04"](tmp_path)
    assert run("check", "04", tmp_path, "--limit", "1") == 0
    assert "1 cases read" in capsys.readouterr().out


def test_a_missing_extra_is_no_fault_of_the_data(tmp_path, monkeypatch):
    TREES["03"](tmp_path)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(MissingExtraError):
        check_dataset(get_dataset("03"), tmp_path)


def test_parsing_imports_nothing_heavy():
    code = (
        "import sys, foundation.cli.datasets\n"
        "print(sorted({'torch', 'numpy', 'nibabel', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_listing_imports_nothing_heavy():
    code = (
        "import sys, foundation.cli.main as main; main.main(['datasets'])\n"
        "print(sorted({'torch', 'numpy', 'nibabel'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LiTS" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_reading_imports_no_torch():
    modules = "foundation.data.check, foundation.data.catalogue"
    code = f"import sys, {modules}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_labels_of_a_sound_tree_are_not_called_empty(tmp_path):
    write_nifti(tmp_path / "img/img0001.nii.gz", make_ct(0), make_affine(0))
    labels = np.zeros((9, 8, 6), np.uint8)
    labels[8, 7, 5] = 14  # one voxel, in the last corner
    write_nifti(tmp_path / "label/label0001.nii.gz", labels, make_affine(0))
    report = check_dataset(get_dataset("01"), tmp_path)
    assert report.faults == [] and report.classes == {"duodenum": (1, 1)}
    assert make_labels(0, (14,)).any()
