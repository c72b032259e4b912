"""Every dataset is found and read in its real layout: labels and geometry exact."""

import json
import locale
import sys
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dataset_trees import (
    DICOM_AFFINE,
    SHAPE,
    TREES,
    make_affine,
    make_ct,
    make_labels,
    write_dicom,
    write_nifti,
)

from foundation.data import DatasetWarning, check_dataset, get_dataset, paper_datasets
from foundation.data.cases import natural_key
from foundation.data.dicom import read_headers, read_pixels
from foundation.data.meaning import meaning
from foundation.data.reading import Image, onto_grid, overlay, read_image, read_label_map
from foundation.errors import MissingExtraError, UsageError, VolumeError


def test_every_dataset_has_a_tree():
    assert set(paper_datasets()) == set(TREES)


@pytest.mark.parametrize("id_", TREES)
def test_a_tree_in_its_real_layout_is_read_back_exactly(id_, tmp_path):
    expected = sorted(TREES[id_](tmp_path), key=lambda each: natural_key(each.id))
    dataset = get_dataset(id_)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)
        cases = dataset.find(tmp_path)
    assert [case.id for case in cases] == [each.id for each in expected]
    for case, truth in zip(cases, expected, strict=True):
        scan = dataset.read(case)
        assert scan.ct is not None and scan.ct.dtype == np.float32
        np.testing.assert_array_equal(scan.ct, truth.ct)
        np.testing.assert_allclose(scan.affine, truth.affine, atol=2e-5)
        assert scan.labels.dtype in (np.uint8, np.uint16)
        assert scan.names[0] == ()
        for label, mask in truth.masks.items():
            values = [v for v, names in enumerate(scan.names) if label in names]
            np.testing.assert_array_equal(np.isin(scan.labels, values), mask, err_msg=label)
        read = {name for value in np.unique(scan.labels) for name in scan.names[value]}
        assert read == {label for label, mask in truth.masks.items() if mask.any()}
        assert (case.annotated, case.split) == (truth.annotated, truth.split)
        assert all(path.is_file() for path in case.labels)


def _key(label: str) -> int | str:
    return int(label) if label.isdigit() else label


@pytest.mark.parametrize("dataset", TREES)
def test_an_intact_tree_has_no_fault(dataset, tmp_path):
    expected = TREES[dataset](tmp_path)
    report = check_dataset(get_dataset(dataset), tmp_path)
    assert report.faults == []
    assert len(report.cases) == len(expected)
    expected.sort(key=lambda each: natural_key(each.id))
    for case, truth in zip(report.cases, expected, strict=True):
        union: dict[str, np.ndarray] = {}
        for label, mask in truth.masks.items():
            for name in get_dataset(dataset).label_map.get(_key(label), ()):
                union[name] = union.get(name, False) | mask
        for name, mask in union.items():  # both sides in one label count as the organ
            name = (
                name if name in case.voxels else name.removesuffix("_left").removesuffix("_right")
            )
            assert not mask.any() or case.voxels[name] >= mask.sum() > 0
    assert sum(report.orientations.values()) == len(expected)


def test_scans_that_are_no_ct_are_left_out_aloud(tmp_path):
    TREES["09"](tmp_path)
    with pytest.warns(DatasetWarning, match=r"amos_0507: an MR scan"):
        cases = get_dataset("AMOS22").find(tmp_path)
    assert [case.id for case in cases] == ["amos_0001", "amos_0500"]
    assert any("amos_0507" in note for note in check_dataset(get_dataset("09"), tmp_path).notes)


def meant(dataset: str, label: str) -> set[str]:
    """Classes of a voxel with this label; a pair whose side is not known yet is its organ."""
    found = get_dataset(dataset)
    value = meaning([label], found.classes_of([label]), found.annotated)
    return {*value.classes, *value.undecided}


def test_a_lesions_voxels_belong_to_its_organ_and_side_where_that_is_annotated():
    assert meant("04", "2") == {"liver_tumor", "liver"}
    assert meant("10_08", "2") == {"hepatic_vessel_tumor"}
    assert meant("10_06", "1") == {"lung_tumor"}
    assert meant("05", "2") == {"kidney_tumor", "kidney"}
    assert meant("05", "3") == {"kidney_cyst", "kidney"}
    assert meant("15_v2", "kidney_cyst_left") == {"kidney_cyst", "kidney_left"}
    assert meant("15_v2", "vertebrae_L1") == set()


@pytest.mark.parametrize(
    ("given", "name"), [("04", "LiTS"), ("lits", "LiTS"), ("msd LIVER", "MSD liver")]
)
def test_datasets_go_by_id_and_name(given, name):
    assert get_dataset(given).name == name


def test_an_unknown_dataset_is_told_the_nearest():
    with pytest.raises(UsageError, match=r"Unknown dataset 'kist'\. Did you mean 'KiTS'"):
        get_dataset("kist")


def test_an_empty_or_missing_folder_is_told_what_was_expected(tmp_path):
    with pytest.raises(UsageError, match=r"expected \*\*/volume-\{number\}\.nii with"):
        get_dataset("04").find(tmp_path)
    with pytest.raises(UsageError, match="is not a folder"):
        get_dataset("04").find(tmp_path / "none")
    with pytest.raises(UsageError, match=r"Expected Task03…/dataset\.json"):
        get_dataset("10_03").find(tmp_path)


def test_a_task_of_the_decathlon_is_also_found_in_its_own_folder(tmp_path):
    TREES["10_09"](tmp_path)
    assert len(get_dataset("10_09").find(tmp_path / "Task09_Spleen")) == 2


# --- labels onto the grid of their image ----------------------------------------------------------


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PLI", "ASL"])
def test_labels_stored_with_other_axes_are_turned_exactly(codes, tmp_path):
    labels, affine = make_labels(0, range(1, 9)), make_affine(0)
    turned = nib.Nifti1Image(labels, affine).as_reoriented(
        nib.orientations.ornt_transform(
            nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
        )
    )
    path = tmp_path / "labels.nii.gz"
    nib.save(turned, path)
    stored, stored_affine = read_label_map(path)
    back = onto_grid(stored, stored_affine, Image(make_ct(0), affine), path)
    np.testing.assert_array_equal(back, labels)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a + np.array([[0, 0, 0, 3], *[[0] * 4] * 3]), "centre "),
        (lambda a: a @ np.diag([1.1, 1, 1, 1]), "spacing "),
        (lambda a: a @ np.diag([-1, 1, 1, 1]), "orientation LAS, not RAS"),
    ],
)
def test_labels_on_another_grid_are_refused(change, words, tmp_path):
    affine = make_affine(0)
    image = Image(make_ct(0), affine)
    with pytest.raises(VolumeError, match=words):
        onto_grid(make_labels(0, (1,)), change(affine), image, tmp_path / "l.nii")
    with pytest.raises(VolumeError, match="shape 9×8×5, not 9×8×6"):
        onto_grid(make_labels(0, (1,))[:, :, :5], affine, image, tmp_path / "l.nii")


def test_a_rounded_header_is_the_same_grid(tmp_path):
    affine = make_affine(0)
    labels = make_labels(0, (1, 2))
    near = np.round(affine, 3)
    np.testing.assert_array_equal(
        onto_grid(labels, near, Image(make_ct(0), affine), tmp_path / "l.nii"), labels
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((3, 3, 3), 0.5), "holds 0.5: labels are whole numbers"),
        (np.full((3, 3, 3), np.nan), "holds nan"),
        (np.full((3, 3, 3), -1, np.int16), "from -1 to -1"),
        (np.full((3, 3, 3), 70000, np.int32), "70000"),
        (np.zeros((3, 3, 3, 2), np.uint8), "one 3-D volume"),
    ],
)
def test_labels_that_are_no_labels_are_refused(values, words, tmp_path):
    path = write_nifti(tmp_path / "labels.nii.gz", values, np.eye(4))
    with pytest.raises(VolumeError, match=words):
        read_label_map(path)


def test_large_labels_stay_exact(tmp_path):
    values = np.arange(27, dtype=np.float32).reshape(3, 3, 3) + 1000
    labels, _ = read_label_map(write_nifti(tmp_path / "labels.nii.gz", values, np.eye(4)))
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, values)


def test_overlapping_masks_keep_every_structure():
    rng = np.random.default_rng(0)
    masks = {f"s{i}": rng.random((7, 6, 5)) < 0.4 for i in range(9)}  # more than 255 combinations?
    labels, names = overlay((7, 6, 5), masks.items())
    for name, mask in masks.items():
        np.testing.assert_array_equal(
            np.isin(labels, [v for v, n in enumerate(names) if name in n]), mask
        )
    assert len(set(names)) == len(names) == labels.max() + 1
    assert np.array_equal(np.unique(labels), np.arange(len(names)))  # none is left unused


def test_a_structure_under_another_leaves_no_name_behind():
    everywhere = np.ones((2, 2, 2), bool)
    labels, names = overlay((2, 2, 2), [("a", everywhere), ("b", everywhere)])
    assert names == ((), ("a", "b"))
    assert labels.dtype == np.uint8 and (labels == 1).all()


# --- DICOM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", ["", "JPEG2000", "JPEG"])
def test_a_dicom_series_gives_hu_and_affine(compress, tmp_path):
    ct = make_ct(1)
    affine = DICOM_AFFINE.copy()
    turn = np.deg2rad(20)  # an oblique series
    affine[:3, :3] = (
        np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
        @ affine[:3, :3]
    )
    write_dicom(tmp_path, ct, affine, compress=compress)
    (tmp_path / "notes.txt").write_text("not a slice")
    image = read_image(tmp_path)
    np.testing.assert_array_equal(image.array, ct)
    np.testing.assert_allclose(image.affine, affine, atol=2e-5)
    assert image.doubts == ()


def test_a_tilted_gantry_shears_the_affine(tmp_path):
    affine = DICOM_AFFINE.copy()
    affine[1, 2] = 0.6  # each slice lies a little further to the front
    write_dicom(tmp_path, make_ct(1), affine)
    np.testing.assert_allclose(read_image(tmp_path).affine, affine, atol=2e-5)


def test_a_series_whose_files_all_have_their_own_series_id_is_one(tmp_path):
    ct = make_ct(1)
    for z in range(SHAPE[2]):
        write_dicom(tmp_path, ct, series=f"1.2.{z + 1}", places=[z])
    np.testing.assert_array_equal(read_image(tmp_path).array, ct)


def _drop(folder: Path) -> None:
    sorted(folder.iterdir())[2].unlink()


def _repeat(folder: Path) -> None:
    file = sorted(folder.iterdir())[2]
    file.with_name("copy.dcm").write_bytes(file.read_bytes())


def _second_series(folder: Path) -> None:
    write_dicom(folder, make_ct(2), series="9.9", name="2-{:03d}.dcm".format)


def _other_size(folder: Path) -> None:
    write_dicom(folder, make_ct(2, (9, 9, 6)), name="1-{:03d}.dcm".format, places=[0])


def _cut_short(folder: Path) -> None:
    file = sorted(folder.iterdir())[2]
    file.write_bytes(file.read_bytes()[:200])


def _shifted(folder: Path) -> None:
    affine = DICOM_AFFINE.copy()
    affine[2, 3] += 0.9
    write_dicom(folder, make_ct(1), affine, places=[3])


def _only_one(folder: Path) -> None:
    for file in sorted(folder.iterdir())[1:]:
        file.unlink()


def _none(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "README").write_text("empty")


BROKEN_SERIES = {
    "a slice is missing": (_drop, "slices are missing between -135 and -130 mm"),
    "a slice is there twice": (_repeat, r"slices lie at the same place: .*copy\.dcm"),
    "two series": (_second_series, r"holds 2 DICOM series \(6 slices in 1\.2\.3\.4"),
    "slices of two sizes": (_other_size, "do not fit together: size"),
    "a file is cut short": (_cut_short, "1-002.dcm is damaged"),
    "uneven slices": (_shifted, "not evenly spaced"),
    "one slice": (_only_one, "a single DICOM slice"),
    "no DICOM": (_none, "holds no DICOM file"),
}


@pytest.mark.parametrize("fault", BROKEN_SERIES)
def test_a_broken_series_is_refused_in_words(fault, tmp_path):
    write_dicom(tmp_path, make_ct(1))
    break_it, words = BROKEN_SERIES[fault]
    break_it(tmp_path)
    with pytest.raises(VolumeError, match=words):
        read_image(tmp_path)


def test_without_simpleitk_the_extra_is_named(tmp_path, monkeypatch):
    write_dicom(tmp_path, make_ct(1))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'universal-ct\[dicom\]'"):
        read_image(tmp_path)


def test_contradicting_orders_of_slices_are_refused(tmp_path):
    write_dicom(tmp_path, make_ct(1), name=lambda n: f"{9 - n}.dcm")
    with pytest.raises(VolumeError, match="give different orders"):
        read_headers(tmp_path).in_file_order()


# --- the open data -------------------------------------------------------------------------------


def test_jpeg_2000_reads_as_the_same_scan_in_nifti(open_data):
    pytest.importorskip("SimpleITK")
    folder = open_data / "totalsegmentator_slab"
    image = read_image(folder / "dicom")
    turned = nib.as_closest_canonical(nib.Nifti1Image(image.array, image.affine))
    nifti = nib.load(folder / "ct.nii.gz")
    np.testing.assert_allclose(turned.affine, nifti.affine, atol=1e-4)
    np.testing.assert_array_equal(turned.get_fdata(dtype=np.float32), nifti.get_fdata())


def test_the_shipped_description_finds_the_open_data(open_data):
    dataset = get_dataset("open-data")
    cases = {case.id: case for case in dataset.find(open_data)}
    assert len(cases) == 12
    assert sum(case.weight > 0 for case in cases.values()) == 10
    assert cases["totalsegmentator_aorta"].annotated == ("aorta", "celiac_trunk")
    assert "liver" in cases["totalsegmentator_crops_0003"].annotated  # a neck: it has none
    assert cases["totalsegmentator_s0327"].image is None
    scan = dataset.read(cases["totalsegmentator_example"])
    assert scan.ct is not None
    names = json.loads((open_data / "totalsegmentator_example/labels.json").read_text())
    present = set(np.unique(scan.labels)) - {0}
    assert all(scan.names[value] == (names[str(value)],) for value in present)
    assert meant("open-data", "lung_upper_lobe_left") == {"lung_left"}
    assert dataset.label_map["hepatic_veins"] == ("hepatic_vessel", "liver")
    assert dataset.label_map["kidney_cyst_left"] == ("kidney_cyst", "kidney_left")
    # Data that the embedded weights were not trained with: nothing describes them yet.
    later = {"amos_0001_labels", "lidc_idri_0001"}
    later |= {f"visible_human_{sex}_vessels_lungs" for sex in ("male", "female")}
    for folder in open_data.iterdir():
        if folder.is_dir() and folder.name not in later:
            assert any(id_.startswith(folder.name) for id_ in cases), folder.name
    assert check_dataset(dataset, open_data, limit=3).faults == []


def test_reading_dicom_leaves_the_locale_as_it_was(tmp_path):
    before = locale.setlocale(locale.LC_ALL)
    voxels = np.arange(60, dtype=np.int16).reshape(4, 5, 3)
    paths = write_dicom(tmp_path / "series", voxels, np.diag([1.0, 1.0, 2.0, 1.0]))
    assert len(read_headers(tmp_path / "series").slices) == 3
    assert read_pixels(paths).shape == (4, 5, 3)
    assert locale.setlocale(locale.LC_ALL) == before
