"""Scans of one's own: every layout gives the same masks, and wrong data are refused in words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_trees import write_nifti
from tuning_trees import (
    SHAPE,
    SPACING_MM,
    affine,
    scan,
    write_folder,
    write_folders,
    write_nnunet,
    write_table,
)

from foundation.data.cases import DatasetWarning
from foundation.data.naming import Naming, NewClass
from foundation.data.store.arrays import StoredCase
from foundation.errors import UsageError
from foundation.taxonomy import NAMES
from foundation.tuning.data import Split, TuningData, draw_validation, read_data

L1 = NewClass("vertebra L1")


def read(path: Path, work: Path, *classes: NewClass, **options: Any) -> TuningData:
    settings: dict[str, Any] = {"spacing_mm": SPACING_MM, "old_classes": NAMES, "workers": 1}
    return read_data(
        path, classes=classes or (L1,), work=work, progress=False, **{**settings, **options}
    )


def mask(case: StoredCase, name: str) -> np.ndarray:
    return case.membership([name])[:, 0][case.read_labels()]


def every(data: TuningData) -> dict[str, StoredCase]:
    cases = (*data.train, *data.validation, *data.test)
    return {case.key.split("/")[1]: case for case in cases}


def totalsegmentator(root: Path) -> Path:
    write_folders(root, 3, masks=True)
    (root / "meta.csv").write_text(
        "image_id;split\ncase_0;train\ncase_1;val\ncase_2;test\n", encoding="utf-8"
    )
    return root


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "folders": (write_folders, "a folder per case"),
    "masks": (lambda root: write_folders(root, masks=True), "a folder per case"),
    "nnunet": (write_nnunet, "nnU-Net's format"),
    "totalsegmentator": (totalsegmentator, "TotalSegmentator's tree"),
    "table": (write_table, "a CSV table"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_masks_that_were_written(layout: str, tmp_path: Path) -> None:
    build, said = LAYOUTS[layout]
    data = read(build(tmp_path / "data"), tmp_path / "work")
    assert data.layout == said
    assert data.known == ("liver",)  # what the model knows is annotated where it is labelled
    cases = every(data)
    assert len(cases) >= 3
    for id_, case in cases.items():
        hu, masks = scan(int(id_[-1]))
        assert set(case.annotated) == {"liver", "vertebra L1"}
        np.testing.assert_array_equal(mask(case, "vertebra L1"), masks["vertebrae_L1"])
        np.testing.assert_array_equal(mask(case, "liver"), masks["liver"])
        stored = case.read_ct()
        assert stored is not None
        np.testing.assert_array_equal(stored, hu)


def test_publishers_splits_are_kept(tmp_path: Path) -> None:
    data = read(totalsegmentator(tmp_path / "data"), tmp_path / "work")
    splits = [[c.key for c in cases] for cases in (data.train, data.validation, data.test)]
    assert splits == [["masks/case_0"], ["masks/case_1"], ["masks/case_2"]]
    nnunet = read(write_nnunet(tmp_path / "nnunet"), tmp_path / "work2")
    assert [case.key for case in nnunet.test] == ["nnunet/ct_3"]


def test_splits_are_drawn_by_a_seed_kept_in_a_file_and_can_be_edited(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", 5)
    first = read(root, tmp_path / "work")
    assert (len(first.train), len(first.validation), len(first.test)) == (4, 1, 0)
    path = tmp_path / "work/splits.json"
    again = read(root, tmp_path / "other")
    assert path.read_text() == (tmp_path / "other/splits.json").read_text()
    assert again.digest == first.digest
    content = json.loads(path.read_text())
    content["train"], moved = content["train"][1:], content["train"][0]
    path.write_text(json.dumps({**content, "validation": [*content["validation"], moved]}))
    edited = read(root, tmp_path / "work")
    assert len(edited.validation) == 2
    assert edited.digest != first.digest
    others = {tuple(draw_validation(list("abcde"), dict.fromkeys("abcde", frozenset("x")), 0.2, s))
              for s in range(20)}  # fmt: skip
    assert len(others) > 1


def test_validation_takes_no_class_from_training() -> None:
    shows = {"a": {"x"}, "b": {"x"}, "c": {"y"}, "d": set()}
    frozen = {key: frozenset(value) for key, value in shows.items()}
    for seed in range(10):
        (taken,) = draw_validation(list("abcd"), frozen, 0.25, seed)
        assert taken in "ab"  # c has the only y, and d shows nothing
    assert draw_validation(["a"], frozen, 0.5, 0) == []


def test_a_test_set_of_its_own(tmp_path: Path) -> None:
    write_folder(tmp_path / "test/far", 11)
    data = read(write_folders(tmp_path / "data"), tmp_path / "work", test=tmp_path / "test")
    assert [case.key for case in data.test] == ["test-maps/far"]
    assert data.counts("vertebra L1") == {"train": 3, "validation": 1, "test": 1}


def test_a_scan_that_is_trained_on_is_no_test(tmp_path: Path) -> None:
    write_folder(tmp_path / "test/renamed", 2)
    with pytest.raises(UsageError, match=r"test-maps/renamed is the same file as maps/case_2"):
        read(write_folders(tmp_path / "data"), tmp_path / "work", test=tmp_path / "test")


def test_chosen_training_scans(tmp_path: Path) -> None:
    root = totalsegmentator(tmp_path / "data")
    write_folder(root / "case_3", 3, masks=True)
    data = read(root, tmp_path / "work", split=Split(train_ids=frozenset({"case_3"})))
    assert [case.key for case in data.train] == ["masks/case_3"]
    assert [case.key for case in data.validation] == ["masks/case_1"]
    with pytest.raises(UsageError, match="has no scan case_9"):
        read(root, tmp_path / "work", split=Split(train_ids=frozenset({"case_9"})))


def test_partly_labelled_scans_annotate_what_they_label(tmp_path: Path) -> None:
    write_folder(tmp_path / "data/a", 0, ("vertebrae_L1",))
    write_folder(tmp_path / "data/b", 1, ("liver", "vertebrae_L1"))
    write_folder(tmp_path / "data/c", 2, ("liver",), masks=True)
    cases = every(read(tmp_path / "data", tmp_path / "work"))
    annotated = {id_: set(case.annotated) for id_, case in cases.items()}
    assert annotated == {"a": {"vertebra L1"}, "b": {"liver", "vertebra L1"}, "c": {"liver"}}


def test_a_class_without_a_side_is_both_sides(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", 2)
    data = read(root, tmp_path / "work", NewClass("hip"), NewClass("bones", labels=("vertebra L1",
        "hip left", "HIP_RIGHT")))  # fmt: skip
    case = every(data)["case_0"]
    _, masks = scan(0)
    hips = masks["hip_left"] | masks["hip_right"]
    np.testing.assert_array_equal(mask(case, "hip"), hips)
    np.testing.assert_array_equal(mask(case, "bones"), hips | masks["vertebrae_L1"])


def test_label_maps_without_names_are_read_by_value(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", 2)
    for path in root.glob("*/labels.json"):
        path.unlink()
    case = every(read(root, tmp_path / "work", NewClass("vertebra L1", labels=("2",))))["case_1"]
    np.testing.assert_array_equal(mask(case, "vertebra L1"), scan(1)[1]["vertebrae_L1"])
    with pytest.raises(UsageError, match=r"none with a name: add labels\.json"):
        read(root, tmp_path / "other")


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", 2)
    file = every(read(root, tmp_path / "work"))["case_0"].folder / "ct.b2nd"
    before = file.stat().st_mtime_ns
    read(root, tmp_path / "work")
    assert file.stat().st_mtime_ns == before
    read(root, tmp_path / "work", NewClass("hip left"))  # other classes: prepared anew
    assert file.stat().st_mtime_ns > before


def test_what_was_read_and_what_was_ignored_is_noted(tmp_path: Path) -> None:
    data = read(write_folders(tmp_path / "data"), tmp_path / "work")
    (note,) = (text for text in data.notes if text.startswith("Labels read"))
    assert note == (
        "Labels read: liver as liver, vertebrae_L1 as vertebra L1. "
        "Ignored, as of no class: hip_left, hip_right."
    )


def test_a_pattern_stands_for_as_many_masks_as_a_scan_has(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", 2, masks=True)
    truth = {}
    for seed, count in ((0, 1), (1, 3)):
        parts = [scan(seed + 10 * number)[1]["hip_left"] for number in range(count)]
        for number, part in enumerate(parts):
            path = root / f"case_{seed}/segmentations/livertumor{number + 1:02}.nii.gz"
            write_nifti(path, part.astype(np.uint8), affine())
        truth[f"case_{seed}"] = np.any(parts, axis=0)
    tumour = NewClass("my tumour", parent="liver", labels=("livertumor*",))
    cases = every(read(root, tmp_path / "work", tumour))
    for id_, expected in truth.items():
        np.testing.assert_array_equal(mask(cases[id_], "my tumour"), expected)
        assert mask(cases[id_], "liver")[expected].all()
    with pytest.raises(UsageError, match=r"has the label 'metastasis\*' of class 'lesion'"):
        read(root, tmp_path / "work", NewClass("lesion", labels=("metastasis*",)))


def test_a_known_class_can_be_learnt_further(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data")
    data = read(root, tmp_path / "work", NewClass("Liver"))
    assert data.names == ("liver",)  # as the model has it
    assert data.known == ()
    for id_, case in every(data).items():
        np.testing.assert_array_equal(mask(case, "liver"), scan(int(id_[-1]))[1]["liver"])


# --- wrong data -----------------------------------------------------------------------------------


def test_one_scan_is_said_to_be_one(tmp_path: Path) -> None:
    case = write_folder(tmp_path / "only", 0)
    with pytest.warns(DatasetWarning, match="There is one scan, maps/only"):
        data = read(case, tmp_path / "work")
    assert data.train == data.validation
    assert "learnt by heart" in data.notes[0]


def test_an_unknown_class_names_what_there_is(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", 2)
    with pytest.raises(UsageError, match=r"'vertebra L9'.*Did you mean 'vertebrae_L1'.*hip_left"):
        read(root, tmp_path / "work", NewClass("vertebra L9"))
    with pytest.raises(UsageError, match=r"label 'hipp' of class 'pelvis'.*Did you mean 'hip_"):
        read(root, tmp_path / "work", NewClass("pelvis", labels=("hipp",)))


@pytest.mark.filterwarnings("ignore:There were too few")
def test_an_empty_mask_everywhere(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", 2, masks=True)
    for path in root.glob("*/segmentations/vertebrae_L1.nii.gz"):
        write_nifti(path, np.zeros(SHAPE, np.uint8), affine())
    with pytest.raises(UsageError, match=r"'vertebra L1' .* empty in every training scan"):
        read(root, tmp_path / "work")


def test_a_mask_on_another_grid_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", 3)
    moved = affine()
    moved[0, 3] = 7.0
    write_nifti(root / "case_1/labels.nii.gz", np.ones(SHAPE, np.uint8), moved)
    match = r"maps/case_1: case_1/labels\.nii\.gz is not on the grid of its image: centre"
    with pytest.raises(UsageError, match=match):
        read(root, tmp_path / "work")
    data = read(root, tmp_path / "work", skip_broken=True)
    assert set(every(data)) == {"case_0", "case_2"}
    assert "case_1 was left out" in data.notes[0]


def test_an_mr_is_refused(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "data", 2)
    hu, _ = scan(1)
    write_nifti(root / "case_1/ct.nii.gz", (hu.astype(int) + 1024).clip(0).astype(np.int16),
                affine())  # fmt: skip
    with pytest.raises(UsageError, match=r"case_1/ct\.nii\.gz has no voxel below 0 HU: an MR"):
        read(root, tmp_path / "work")
    nnunet = write_nnunet(tmp_path / "nnunet")
    index = json.loads((nnunet / "dataset.json").read_text())
    (nnunet / "dataset.json").write_text(json.dumps({**index, "channel_names": {"0": "T1"}}))
    with pytest.raises(UsageError, match="its scans are T1"):
        read(nnunet, tmp_path / "work")


def test_no_scan(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"No labelled scan in .*Give a folder per case"):
        read(tmp_path / "empty", tmp_path / "work")
    with pytest.raises(UsageError, match="neither a folder nor a CSV table"):
        read(tmp_path / "nowhere", tmp_path / "work")
    write_nifti(tmp_path / "bare/a/ct.nii.gz", scan(0)[0], affine())
    with pytest.raises(UsageError, match="no labels for the image"):
        read(tmp_path / "bare", tmp_path / "work")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("image,mask\n", "has the columns image, mask; it needs image, label and class"),
        ("image,label,class\n", "no line besides"),
        ("image,label,class\na.nii.gz,b.nii.gz,liver", r"line 2: image 'a\.nii\.gz' does not"),
        ("image,label,class\nct.nii,ct.nii,", "line 2: class is empty"),
        ("image;label;class;value\nct.nii;ct.nii;liver;x", "value is 'x'; give a whole number"),
    ],
)
def test_wrong_tables(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "ct.nii").touch()
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(UsageError, match=match):
        read(tmp_path / "table.csv", tmp_path / "work")


def test_scans_of_one_name_in_a_table_keep_apart(tmp_path: Path) -> None:
    for seed in range(2):
        write_folder(tmp_path / f"{seed}", seed)
    lines = [f"{n}/ct.nii.gz,{n}/labels.nii.gz,vertebra L1,2" for n in range(2)]
    (tmp_path / "t.csv").write_text("\n".join(["Image,Label,Class,Value", *lines]))
    assert set(every(read(tmp_path / "t.csv", tmp_path / "work"))) == {"0_ct", "1_ct"}


# --- names ----------------------------------------------------------------------------------------


def naming(*new: NewClass, old: tuple[str, ...] = NAMES) -> Naming:
    return Naming(new or (L1,), old)


def test_a_known_class_of_parts_needs_all_of_them() -> None:
    lobes = ["lung_upper_lobe_left", "lung_lower_lobe_left"]
    assert naming().annotated(lobes) == ("lung_left",)
    assert naming().annotated(lobes[:1]) == ()
    assert naming(NewClass("lung upper lobe left")).classes(lobes[0]) == (
        "lung upper lobe left",
        "lung_left",
    )


def test_a_merged_pair_is_both_sides_unless_it_is_to_be_learnt() -> None:
    assert naming().classes("Kidneys") == ("kidney_right", "kidney_left")
    learning = naming(NewClass("kidney"))
    assert learning.classes("kidney") == ("kidney",)
    assert learning.annotated(["kidney"]) == ("kidney",)


def test_a_lesion_lies_in_its_organ() -> None:
    cyst = NewClass("spleen cyst", parent="spleen")
    assert naming(cyst).classes("spleen_cyst") == ("spleen cyst", "spleen")
    stone = NewClass("kidney stone", parent="kidney", labels=("stone_left", "stone_right"))
    assert naming(stone).classes("stone_left") == ("kidney stone", "kidney_left")
    # Nothing says in which kidney: then neither may count as labelled.
    stone = NewClass("kidney stone", parent="kidney")
    assert naming(stone).annotated(["kidney stone", "kidney", "liver"]) == (
        "kidney stone",
        "liver",
    )


def test_what_is_to_be_learnt_is_no_known_class() -> None:
    again = naming(NewClass("Spleen"))
    assert "spleen" not in again.old
    assert again.classes("spleen") == ("spleen",)  # as the model has it
    with pytest.raises(UsageError, match="one class; name it once"):
        naming(NewClass("vertebra_L1"), NewClass("Vertebra L1"))
    with pytest.raises(UsageError, match="named twice"):
        naming(L1, L1)


def test_a_known_class_that_is_learnt_further_has_the_labels_of_the_known_one() -> None:
    again = naming(NewClass("intestine"), NewClass("lung_left"))
    lobes = ["lung_upper_lobe_left", "lung_lower_lobe_left"]
    assert again.classes("small_bowel") == ("intestine",)
    assert again.annotated([*lobes, "small_bowel"]) == ("intestine", "lung_left")
    assert again.annotated(lobes[:1]) == ()
    # Of a merged pair one side is learnt: the label is of both, and is split.
    assert again.classes("lungs") == ("lung_right", "lung_left")
    assert again.annotated(["lungs"]) == ("lung_left", "lung_right")
    # It names its own labels: then others are not its.
    own = naming(NewClass("liver", labels=("my liver",)))
    assert own.classes("my liver") == ("liver",)
    assert own.classes("liver") == ()


def test_sides_written_without_a_gap_are_known() -> None:
    assert naming().classes("leftkidney") == ("kidney_left",)
    assert naming().classes("rightlung") == ("lung_right",)


def test_a_pattern_needs_one_label_that_fits() -> None:
    tumour = naming(NewClass("liver lesion x", labels=("LiverTumor*",)))
    assert tumour.classes("livertumor07") == ("liver lesion x",)
    assert tumour.annotated(["liver", "livertumor1"]) == ("liver lesion x", "liver")
    assert tumour.annotated(["liver", "liverkyst"]) == ("liver",)
