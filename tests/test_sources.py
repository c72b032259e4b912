"""Anatomies: what a label means, what a folder holds, where skin and femoral heads lie."""

from pathlib import Path

import numpy as np
import pytest
from anatomies import ball, paired_organs, write_folder, write_paired_organs

from foundation.errors import UsageError
from foundation.phantom import TISSUES
from foundation.pretraining.sources import (
    COARSE_MM,
    FINE_MM,
    INDEX,
    LESION_HOSTS,
    SKIN_MARGIN,
    _add_femur_heads,
    _hull_distance_mm,
    load_anatomies,
    membership_table,
    phantom_anatomy,
)
from foundation.taxonomy import CLASSES, NAMES, by_name


def classes_of(label: str) -> set[str]:
    row = membership_table({7: label})[7]
    return {CLASSES[channel].name for channel in np.flatnonzero(row)}


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        ("spleen", {"spleen"}),
        ("small_bowel", {"intestine"}),
        ("lung_upper_lobe_left", {"lung_left"}),
        ("lung_middle_lobe_right", {"lung_right"}),
        ("kidney_cyst_left", {"kidney_cyst", "kidney_left"}),
        ("kidney_cyst_right", {"kidney_cyst", "kidney_right"}),
        ("hepatic_veins", {"hepatic_vessel", "liver"}),
        ("portal_vein_branches", {"hepatic_vessel", "liver"}),
        ("portal_vein_and_splenic_vein", {"portal_vein_and_splenic_vein"}),
        ("femur_head_right", {"femur_head_right"}),
        ("femur_right", set()),  # the whole bone is more than its head
        ("vertebrae_L1", set()),
        ("heart", set()),
        ("uterus", set()),
    ],
)
def test_what_a_label_belongs_to(label: str, classes: set[str]) -> None:
    assert classes_of(label) == classes


def test_unnamed_values_belong_to_nothing() -> None:
    table = membership_table({3: "liver"})
    assert table.shape == (256, len(CLASSES))
    assert np.flatnonzero(table.any(1)).tolist() == [3]


def test_every_class_can_be_drawn() -> None:
    """In the phantom's tissues, or as a lesion that the sampler grows."""
    drawn = set().union(*(classes_of(name) for name in TISSUES))
    assert drawn == set(NAMES)
    for lesion, hosts in LESION_HOSTS.items():
        spec = by_name(lesion)
        assert spec.kind == "lesion"
        assert all(by_name(host).kind == "organ" for host in hosts)
    assert set(LESION_HOSTS) == {c.name for c in CLASSES if c.kind == "lesion"}


def test_only_annotated_classes_count() -> None:
    anatomy = paired_organs()
    anatomy.annotated = (INDEX["liver"],)
    anatomy.__post_init__()
    assert list(anatomy.centres) == [INDEX["liver"]]
    assert not anatomy.membership[:, INDEX["kidney_left"]].any()


def test_centres_lie_in_their_class() -> None:
    anatomy = paired_organs()
    present = {CLASSES[channel].name for channel in anatomy.centres}
    assert present == {"kidney_left", "kidney_right", "liver"}
    for channel, positions in anatomy.centres.items():
        values = anatomy.label_map[tuple(positions.T)]
        assert anatomy.membership[values, channel].all()


def test_a_femurs_head_is_the_part_at_the_hip() -> None:
    shape = (60, 50, 120)
    head, hip = ball(shape, (30, 25, 90), 12), ball(shape, (30, 25, 90), 18)
    hip &= ~ball(shape, (30, 25, 90), 13)
    hip[:, :, :86] = False  # a socket over the ball
    shaft = ball(shape, (30, 25, 90), 200)
    shaft[:, :, 80:] = False
    shaft[:25] = shaft[36:] = shaft[:, :20] = shaft[:, 31:] = False
    label_map = np.zeros(shape, np.uint8)
    label_map[shaft | head] = 1
    label_map[hip] = 2
    names = {1: "femur_left", 2: "hip_left"}
    assert _add_femur_heads(label_map, names) == ["femur_head_left"]
    assert names[3] == "femur_head_left"
    found = label_map == 3
    assert (found & head).sum() > 0.9 * head.sum()
    assert not (found & ~(shaft | head)).any()
    assert (label_map[:, :, :70] == 3).sum() == 0  # the shaft stays femur
    assert (label_map == 1).sum() > 1000


@pytest.mark.parametrize("missing", ["hip_left", "femur_left", "contact"])
def test_no_joint_no_femur_head(missing: str) -> None:
    label_map = np.zeros((40, 20, 40), np.uint8)
    label_map[5:15, 5:15, 5:15] = 1
    label_map[5:15, 5:15, 15 if missing != "contact" else 30 :] = 2
    names = {1: "femur_left", 2: "hip_left"}
    names = {value: name for value, name in names.items() if name != missing}
    before = label_map.copy()
    assert _add_femur_heads(label_map, names) == []
    assert (label_map == before).all()


def test_a_folder_becomes_an_anatomy_in_ras_at_2_mm(tmp_path: Path) -> None:
    expected = paired_organs()
    write_paired_organs(tmp_path)
    (anatomy,) = load_anatomies(tmp_path)
    assert anatomy.name == "totalsegmentator_s0328"
    assert (anatomy.label_map == expected.label_map).all()
    assert anatomy.ct is None and not anatomy.has_skin
    left, right = (anatomy.centres[INDEX[f"kidney_{side}"]] for side in ("left", "right"))
    assert left[:, 0].max() < right[:, 0].min()
    assert INDEX["liver_tumor"] in anatomy.annotated  # grown by the sampler
    assert INDEX["rectum"] not in anatomy.annotated  # TotalSegmentator has no rectum


def test_spacing_becomes_2_mm(tmp_path: Path) -> None:
    coarse = np.zeros((20, 20, 20), np.uint8)
    coarse[5:15, 5:15, 5:15] = 1
    hu = np.where(coarse, 100, -1000).astype(np.float32)
    folder = tmp_path / "totalsegmentator_slab"
    write_folder(folder, coarse, {1: "liver"}, spacing_mm=3.0, ct=hu)
    (anatomy,) = load_anatomies(tmp_path)
    assert anatomy.label_map.shape == (30, 30, 30)
    volume_mm3 = (anatomy.label_map == 1).sum() * FINE_MM**3
    assert volume_mm3 == pytest.approx(1000 * 27, rel=0.15)
    assert anatomy.ct is not None and anatomy.ct.shape == anatomy.label_map.shape
    assert anatomy.ct[12:18, 12:18, 12:18] == pytest.approx(100, abs=1)
    assert anatomy.skin_mm is None  # a scan needs no body laid around it
    assert INDEX["liver_tumor"] not in anatomy.annotated  # nor are lesions grown in it


def test_a_body_outline_is_skin_and_not_a_tissue(tmp_path: Path) -> None:
    label_map = np.zeros((40, 40, 24), np.uint8)
    label_map[8:32, 8:32] = 1
    label_map[16:24, 16:24, 8:16] = 2
    write_folder(tmp_path / "visible_human_male", label_map, {1: "body", 2: "liver"})
    (anatomy,) = load_anatomies(tmp_path)
    assert anatomy.has_skin
    assert dict(anatomy.names) == {2: "liver"}
    assert set(np.unique(anatomy.label_map)) == {0, 2}
    assert anatomy.skin_mm is not None
    step = round(COARSE_MM / FINE_MM)
    middle = tuple(SKIN_MARGIN + size // 2 // step for size in label_map.shape)
    assert anatomy.skin_mm[middle] == pytest.approx(-24, abs=COARSE_MM)  # mm below the skin
    assert anatomy.skin_mm[0, middle[1], middle[2]] > 60
    # The body goes on above and below the scan.
    assert anatomy.skin_mm[middle[0], middle[1], 0] == pytest.approx(-24, abs=COARSE_MM)


def test_the_hull_closes_what_lies_between_organs() -> None:
    label_map = np.zeros((60, 40, 40), np.uint8)
    label_map[5:20, 10:30] = 1
    label_map[32:50, 10:30] = 2
    distance_mm = _hull_distance_mm(label_map)
    step = round(COARSE_MM / FINE_MM)
    between = tuple(SKIN_MARGIN + at // step for at in (26, 20, 20))
    assert distance_mm[between] < -8
    far = tuple(SKIN_MARGIN + at // step for at in (26, 20 + 44, 20))
    assert distance_mm[far] == pytest.approx(68, abs=3 * COARSE_MM)


def test_a_phantom_annotates_every_class() -> None:
    anatomy = phantom_anatomy(0)
    assert anatomy.annotated == tuple(range(len(CLASSES)))
    assert anatomy.skin_mm is None and anatomy.ct is None
    lesions = {INDEX[name] for name in LESION_HOSTS}
    assert not lesions & set(anatomy.centres)  # the sampler grows them
    assert len(anatomy.centres) > 20


def test_a_folder_without_data_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No training data in .*totalsegmentator_s0328"):
        load_anatomies(tmp_path)
    write_paired_organs(tmp_path)
    with pytest.raises(UsageError, match="other than totalsegmentator_s0328: expected a folder"):
        load_anatomies(tmp_path, ["totalsegmentator_s0328"])


def test_a_misspelt_folder_to_hold_out_is_an_error(tmp_path: Path) -> None:
    write_paired_organs(tmp_path)
    with pytest.raises(UsageError, match="Cannot hold out totalsegmentator_exmaple: choose from"):
        load_anatomies(tmp_path, ["totalsegmentator_exmaple"])


@pytest.mark.slow
def test_the_open_data(open_data: Path) -> None:
    anatomies = {a.name: a for a in load_anatomies(open_data, ["totalsegmentator_example"])}
    assert "totalsegmentator_example" not in anatomies
    for anatomy in anatomies.values():
        assert anatomy.label_map.dtype == np.uint8
        assert anatomy.centres, anatomy.name
        assert set(anatomy.centres) <= set(anatomy.annotated)
        if anatomy.ct is not None:
            assert anatomy.ct.shape == anatomy.label_map.shape
            assert anatomy.ct.min() < -800 and anatomy.ct.max() > 300
            aorta = anatomy.membership[anatomy.label_map, INDEX["aorta"]]
            assert anatomy.ct[aorta].mean() > 30
    body = anatomies["totalsegmentator_s0328"]
    heads = [body.centres[INDEX[f"femur_head_{side}"]] for side in ("left", "right")]
    assert heads[0][:, 0].max() < heads[1][:, 0].min()
    for head in heads:
        assert np.ptp(head, axis=0).max() * FINE_MM < 2 * 27 + 2
    liver = anatomies["totalsegmentator_liver_vessels"]
    vessels = liver.membership[:, INDEX["hepatic_vessel"]]
    assert vessels.any() and liver.membership[vessels, INDEX["liver"]].all()
