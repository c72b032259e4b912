"""Datasets of one's own: YAML descriptions, nnU-Net's folders, and what is refused in them."""

import datetime
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from dataset_trees import make_affine, make_ct, make_labels, write_nifti

from foundation.data import DatasetWarning, get_dataset
from foundation.data.description import CaseSettings, Description
from foundation.data.store.arrays import Store
from foundation.data.store.prepare import prepare
from foundation.errors import UsageError, VolumeError
from foundation.taxonomy import NAMES

BASE = {
    "name": "my-ct",
    "licence": "CC-BY-4.0",
    "layout": "nifti",
    "images": "{id}/ct.nii.gz",
    "labels": "{id}/labels.nii.gz",
    "classes": {1: "liver", 2: ["liver", "liver_tumor"], 3: "kidney", 4: []},
}


def describe(folder: Path, /, **changes):
    content = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    path = folder / "my-ct.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def write_case(root: Path, name: str, seed: int = 0, values=(1, 2, 3, 4)):
    ct, labels, affine = make_ct(seed), make_labels(seed, values), make_affine(seed)
    write_nifti(root / name / "ct.nii.gz", ct, affine)
    write_nifti(root / name / "labels.nii.gz", labels, affine)
    return ct, labels


def test_a_yaml_file_describes_images_and_labels(tmp_path):
    ct, labels = write_case(tmp_path / "data", "a")
    dataset = get_dataset(describe(tmp_path, weight=2.5))
    (case,) = dataset.find(tmp_path / "data")
    scan = dataset.read(case)
    np.testing.assert_array_equal(scan.ct, ct)
    np.testing.assert_array_equal(scan.labels, labels)
    assert scan.names == ((), ("1",), ("2",), ("3",), ("4",))
    assert (case.dataset, case.id, case.weight) == ("my-ct", "a", 2.5)
    assert case.annotated == ("kidney_right", "kidney_left", "liver", "liver_tumor")
    assert dataset.label_map[3] == ("kidney_right", "kidney_left")
    assert dataset.classes_of(["2", "4"]) == {"2": ("liver", "liver_tumor")}
    assert dataset.unused == ("4",)
    assert dataset.licence == "CC-BY-4.0"


def test_classes_of_ones_own_bring_their_prompt(tmp_path):
    own = {"name": "vertebra L1", "prompt": "A CT of the first lumbar vertebra"}
    classes = {1: own, 2: ["liver", {"name": "cable"}], 3: ["vertebra L1", "liver"]}
    dataset = get_dataset(describe(tmp_path, classes=classes))
    assert dataset.prompts == {"vertebra L1": own["prompt"]}  # a training makes that of cable
    assert dataset.classes_of("13") == {"1": ("vertebra L1",), "3": ("vertebra L1", "liver")}
    assert dataset.annotated == ("liver", "vertebra L1", "cable")


def test_unknown_labels_and_overrides_of_single_cases(tmp_path):
    for seed, name in enumerate("abc"):
        write_case(tmp_path, name, seed, (1, 2, 7))
    cases = {"b": {"annotated": ["liver"], "weight": 0, "licence": "MIT"}, "c": {"image": False}}
    dataset = get_dataset(describe(tmp_path, unknown=[7], cases=cases))
    a, b, c = dataset.find(tmp_path)
    assert a.unknown == ("7",) and a.annotated == dataset.annotated
    assert (b.annotated, b.weight, b.licence) == (("liver",), 0, "MIT")
    assert c.image is None
    scan = dataset.read(c)
    assert scan.ct is None and ("7",) in scan.names


def test_one_file_per_structure(tmp_path):
    affine = make_affine(0)
    liver, tumor = make_labels(0, (1,)), make_labels(1, (1,))
    write_nifti(tmp_path / "p1/ct.nii.gz", make_ct(0), affine)
    write_nifti(tmp_path / "p1/seg/liver.nii.gz", liver, affine)
    write_nifti(tmp_path / "p1/seg/lesion.nii.gz", tumor, affine)
    dataset = get_dataset(
        describe(
            tmp_path,
            layout="per-structure",
            labels="{id}/seg/*.nii.gz",
            classes={"liver": "liver", "lesion": "liver_tumor"},
        )
    )
    scan = dataset.read(dataset.find(tmp_path)[0])
    both = [v for v, names in enumerate(scan.names) if set(names) == {"liver", "lesion"}]
    np.testing.assert_array_equal(np.isin(scan.labels, both), (liver > 0) & (tumor > 0))


def test_names_come_from_a_file_of_the_case(tmp_path):
    _, labels = write_case(tmp_path, "a", values=(1, 2, 5))
    write_case(tmp_path, "b", values=(1, 2))
    for name, third in (("a", {"5": "vertebrae_L1"}), ("b", {})):
        names = {"1": "small_bowel", "2": "lung_upper_lobe_left", **third}
        (tmp_path / name / "labels.json").write_text(json.dumps(names))
    dataset = get_dataset(
        describe(
            tmp_path,
            classes=None,
            names_file="{id}/labels.json",
            vocabulary="totalsegmentator",
            annotated=["intestine", "lung"],
        )
    )
    case = dataset.find(tmp_path)[0]
    assert case.labels[-1] == case.names_file == tmp_path / "a/labels.json"
    scan = dataset.read(case)
    np.testing.assert_array_equal(scan.labels, labels)
    assert scan.names[1] == ("small_bowel",) and scan.names[5] == ("vertebrae_L1",)
    assert scan.names[3] == ()
    names = ("small_bowel", "vertebrae_L1")
    assert dataset.classes_of(names) == {"small_bowel": ("intestine",)}
    assert case.annotated == ("lung_right", "lung_left", "intestine")
    (tmp_path / "a/labels.json").write_text('{"1": "small_bowel"}')
    with pytest.raises(VolumeError, match=r"has label 2, 5, which labels\.json does not name"):
        dataset.read(case)


def test_cases_may_be_listed_one_by_one(tmp_path):
    _, labels = write_case(tmp_path, "one")
    write_case(tmp_path, "two")
    (tmp_path / "two/labels.nii.gz").unlink()
    cases = {
        "first": {"image": "one/ct.nii.gz", "labels": "one/labels.nii.gz"},
        "two": None,
        "bare": {"image": "two/ct.nii.gz", "labels": False, "annotated": []},
        "elsewhere": {},
    }
    dataset = get_dataset(describe(tmp_path, layout="cases", cases=cases))
    with pytest.warns(DatasetWarning, match=r"1 cases are incomplete.*two: does not exist"):
        bare, first = dataset.find(tmp_path)
    np.testing.assert_array_equal(dataset.read(first).labels, labels)
    assert bare.labels == () and bare.annotated == ()
    assert not dataset.read(bare).labels.any()


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "liver": 1, "Left Kidney": 2, "kidneys": 3},
        {"0": "background", "1": "liver", "2": "Left Kidney", "3": "kidneys"},
    ],
)
def test_a_folder_of_nnu_net_needs_no_description(labels, tmp_path):
    root = tmp_path / "Dataset042_Mine"
    ct, truth, affine = make_ct(0), make_labels(0, (1, 2, 3)), make_affine(0)
    write_nifti(root / "imagesTr/x_001_0000.nii.gz", ct, affine)
    write_nifti(root / "labelsTr/x_001.nii.gz", truth, affine)
    index = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps({**index, "numTraining": 1}))
    dataset = get_dataset(root)
    (case,) = dataset.find(root)
    assert (case.dataset, case.id) == ("Dataset042_Mine", "x_001")
    assert dataset.label_map == {
        1: ("liver",),
        2: ("kidney_left",),
        3: ("kidney_right", "kidney_left"),
    }
    np.testing.assert_array_equal(dataset.read(case).labels, truth)
    yaml_adapter = get_dataset(describe(tmp_path, layout="nnunet", images=None, labels=None))
    assert [each.id for each in yaml_adapter.find(root)] == ["x_001"]


def test_nnu_net_labels_that_are_no_classes_are_refused(tmp_path):
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "femur": 1}}')
    with pytest.raises(UsageError, match=r"Unknown class 'femur'.*describe the dataset in YAML"):
        get_dataset(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lables": "x"}, r"unknown key 'lables'\. Did you mean 'labels'\? Allowed: name, id"),
        ({"name": "my ct/1"}, "name is 'my ct/1'"),
        ({"layout": "bids"}, "layout is 'bids'; choose from nifti"),
        ({"classes": {1: "livver"}}, r"label 1: Unknown class 'livver'\. Did you mean 'liver'"),
        ({"classes": {"liver": "liver"}}, "label values are whole numbers"),
        ({"classes": None}, "no classes"),
        ({"classes": {1: {"nam": "x"}}}, "unknown key 'nam'"),
        ({"annotated": ["spline"]}, r"annotated: Unknown class 'spline'"),
        ({"annotated": "liver"}, "annotated is 'liver'; expected a list"),
        ({"images": "ct.nii.gz"}, r"has no \{id\}"),
        ({"labels": "../{id}.nii.gz"}, "leaves the folder"),
        ({"labels": None}, "labels is missing"),
        ({"vocabulary": "radlex"}, "vocabulary is 'radlex'; .*choose from totalsegmentator"),
        ({"vocabulary": "totalsegmentator"}, "a vocabulary needs annotated"),
        ({"weight": -1}, "weight is -1"),
        ({"cases": {"a": {"wieght": 2}}}, "cases.a: unknown key 'wieght'"),
        ({"layout": "cases"}, "no cases are given"),
        ({"layout": "index"}, "images and labels: layout index does not use that"),
        ({"folder": "Task03"}, "folder: layout nifti does not use that"),
    ],
)
def test_a_wrong_description_is_refused_in_words(changes, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        get_dataset(describe(tmp_path, **changes))


VALUES: list[Any] = [
    *(None, True, False, 0, 5, -1, 1.5, float("nan"), "", "x", "{id}/x.nii", [], [7], [[]]),
    *([None], {}, {"a": 1}, {1: {"name": 2}}, {"a": [None]}, datetime.date(2026, 1, 1)),
]


@pytest.mark.parametrize(
    "layout",
    ["nifti", *(pytest.param(each, marks=pytest.mark.slow) for each in ("per-structure", "cases"))],
)
def test_no_value_of_any_key_ends_in_a_traceback(layout, tmp_path):
    write_nifti(tmp_path / "a/ct.nii.gz", make_ct(0), make_affine(0))
    base = {**BASE, "layout": layout, "cases": {"a": {}}}
    if layout == "per-structure":
        base["classes"] = {"liver": "liver"}
    contents = [{**base, f.name: value} for f in fields(Description) for value in VALUES]
    contents += [
        {**base, "cases": {"a": {f.name: value}}} for f in fields(CaseSettings) for value in VALUES
    ]
    contents += [{**base, "cases": {"a": value}} for value in VALUES]
    contents += [{**base, "classes": {1: value}} for value in VALUES]
    contents += [{**base, "classes": {1: {"name": value}}} for value in VALUES]
    read = 0
    path = tmp_path / "fuzz.yaml"
    for content in contents:
        path.write_text(yaml.safe_dump(content))
        try:
            get_dataset(path).survey(tmp_path)
            read += 1
        except UsageError as error:
            assert str(path) in str(error) or str(tmp_path) in str(error)
    assert 0 < read < len(contents)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unknown": 9}, r"unknown is 9; expected a list"),
        ({"images": 5}, r"images is 5; expected str. Put it in quotes"),
        ({"cases": {"a": {"unknown": None, "weight": "2"}}}, r"cases.a.weight is '2'; expected"),
        ({"cases": {"a": {"image": True}}}, r"cases.a.image is True"),
        ({"rule": "ct_up_to_500"}, r"Did you mean 'ct_up_to_id_500'"),
        (
            {"classes": {1: {"name": " "}}},
            r"classes.1: A class needs a name with a letter or digit",
        ),
        ({"classes": {1: 5}}, r"classes.1 is 5"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(changes, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        get_dataset(describe(tmp_path, **changes))


def test_a_pattern_names_as_many_masks_as_a_case_has(tmp_path):
    affine = make_affine(0)
    lesions = [make_labels(seed, (1,)) for seed in range(3)]
    for case, count in (("p1", 3), ("p2", 1)):
        write_nifti(tmp_path / case / "ct.nii.gz", make_ct(0), affine)
        write_nifti(tmp_path / case / "seg/liver.nii.gz", np.ones_like(lesions[0]), affine)
        for number in range(count):
            file = tmp_path / case / f"seg/livertumor{number + 1:02}.nii.gz"
            write_nifti(file, lesions[number], affine)
    path = describe(
        tmp_path,
        layout="per-structure",
        labels="{id}/seg/*.nii.gz",
        classes={"liver": "liver", "livertumor*": "liver_tumor"},
    )
    dataset = get_dataset(path)
    for case, count in zip(dataset.find(tmp_path), (3, 1), strict=True):
        scan = dataset.read(case)
        classes = dataset.classes_of({name for names in scan.names for name in names})
        table = [any("liver_tumor" in classes[n] for n in names) for names in scan.names]
        truth = np.any([lesion > 0 for lesion in lesions[:count]], axis=0)
        np.testing.assert_array_equal(np.array(table)[scan.labels], truth)
    store = tmp_path / "store"
    prepare([(str(path), tmp_path)], store, workers=1, spacing_mm=5.0, progress=False)
    assert all("liver_tumor" in case["voxels"] for case in Store(store).manifest["cases"].values())
    write_nifti(tmp_path / "p2/seg/bone.nii.gz", lesions[2], affine)
    with pytest.raises(VolumeError, match="p2 has label bone, which is not in the label map"):
        dataset.read(dataset.find(tmp_path)[1])


def test_what_is_no_yaml_is_refused(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("name: [")
    with pytest.raises(UsageError, match="cannot be read as YAML"):
        get_dataset(path)
    path.write_text("- a list")
    with pytest.raises(UsageError, match="expected keys and values, not"):
        get_dataset(path)


def test_the_shipped_description_says_what_each_case_annotates():
    dataset = get_dataset("open-data")
    assert set(dataset.annotated) <= set(NAMES)
    # Lesions are grown inside organs by the training, and are in no label map.
    assert {"celiac_trunk", "hepatic_vessel", "rectum", "prostate"} <= set(dataset.annotated)
    assert not {"liver_tumor", "kidney_cyst"} & set(dataset.annotated)
