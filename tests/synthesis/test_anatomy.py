"""Anatomies: what a label means, what a folder holds, where skin and femoral heads lie."""

from pathlib import Path

import numpy as np
import pytest
from anatomies import harmonised, paired_organs, write_anatomies, write_paired_organs

from foundation.data.store.arrays import Store
from foundation.data.store.prepare import prepare
from foundation.errors import UsageError
from foundation.synthesis.anatomy import (
    COARSE_MM,
    FINE_MM,
    SKIN_MARGIN,
    _hull_distance_mm,
    load_anatomies,
    membership_of,
    phantom_anatomy,
    sets_of,
)
from foundation.synthesis.lesions import LESION_HOSTS
from foundation.synthesis.phantom import TISSUES
from foundation.taxonomy import CLASSES, NAMES, by_name


def classes_of(label: str) -> set[str]:
    return {*sets_of({7: label})[7]}


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        ("spleen", {"spleen"}),
        ("small_bowel", {"intestine"}),
        ("lung_upper_lobe_left", {"lung_left"}),
        ("lung_middle_lobe_right", {"lung_right"}),
        ("hepatic_vessel", {"hepatic_vessel", "liver"}),
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
    table = membership_of({3: {"liver", "mine"}, 4: ()}, ("spleen", "mine", "liver"))
    assert table.shape == (256, 3)
    assert np.argwhere(table).tolist() == [[3, 1], [3, 2]]


def test_every_class_can_be_drawn() -> None:
    """In the phantom's tissues, or as a lesion that views grow."""
    drawn = set().union(*(classes_of(name) for name in TISSUES))
    assert drawn == set(NAMES)
    for lesion, hosts in LESION_HOSTS.items():
        spec = by_name(lesion)
        assert spec.kind == "lesion"
        assert all(by_name(host).kind == "organ" for host in hosts)
    assert set(LESION_HOSTS) == {c.name for c in CLASSES if c.kind == "lesion"}


def test_only_annotated_classes_count() -> None:
    anatomy = paired_organs()
    anatomy.annotated = ("liver",)
    anatomy.__post_init__()
    assert list(anatomy.centres) == ["liver"]
    assert set().union(*anatomy.sets.values()) == {"liver"}


def test_centres_lie_in_their_class() -> None:
    anatomy = paired_organs()
    assert set(anatomy.centres) == {"kidney_left", "kidney_right", "liver"}
    for name, positions in anatomy.centres.items():
        values = anatomy.label_map[tuple(positions.T)]
        assert all(name in anatomy.sets[value] for value in values)


def test_a_prepared_label_map_becomes_an_anatomy(tmp_path: Path) -> None:
    expected = paired_organs()
    (anatomy,) = load_anatomies(write_paired_organs(tmp_path))
    assert anatomy.name == "open/pair"
    assert (anatomy.label_map == expected.label_map).all()
    assert anatomy.ct is None and not anatomy.has_skin and anatomy.skin_mm is not None
    left, right = (anatomy.centres[f"kidney_{side}"] for side in ("left", "right"))
    assert left[:, 0].max() < right[:, 0].min()
    # Lesions of the annotated organs are grown in views; of the others nothing is known.
    grown = {"kidney_tumor", "kidney_cyst", "liver_tumor"}
    assert set(anatomy.annotated) == {"kidney_left", "kidney_right", "liver"} | grown


def test_classes_beside_the_taxonomy_come_after_it(tmp_path: Path) -> None:
    label_map = paired_organs().label_map
    organs = ("kidney_left", "my organ", "another", "liver")
    case = harmonised(label_map, organs, ("my organ", "liver", "another"))
    (anatomy,) = load_anatomies(write_anatomies(tmp_path, {"one": case}))
    assert anatomy.annotated == ("liver", "liver_tumor", "another", "my organ")
    assert list(anatomy.centres) == ["liver", "another", "my organ"]
    assert (anatomy.label_map[tuple(anatomy.centres["my organ"].T)] == 2).all()


def test_a_prepared_scan_is_not_rendered(tmp_path: Path) -> None:
    label_map = np.zeros((30, 30, 30), np.uint8)
    label_map[8:22, 8:22, 8:22] = 1
    label_map[:, :, :3] = 2
    hu = np.where(label_map == 1, 100, -1000)
    case = harmonised(label_map, ("liver", "nobody knows"), ("liver",), ct=hu, unknown=(2,))
    (anatomy,) = load_anatomies(write_anatomies(tmp_path, {"scan": case}))
    assert anatomy.ct is not None and (anatomy.ct == hu).all()
    assert anatomy.skin_mm is None  # a scan needs no body laid around it
    assert anatomy.annotated == ("liver",)  # nor are lesions grown in it
    assert anatomy.unknown == (2,)


def test_a_body_outline_is_skin_and_not_a_tissue(tmp_path: Path) -> None:
    label_map = np.zeros((40, 40, 24), np.uint8)
    label_map[8:32, 8:32] = 1
    label_map[16:24, 16:24, 8:16] = 2
    case = harmonised(label_map, ("body", "liver"), ("liver",))
    (anatomy,) = load_anatomies(write_anatomies(tmp_path, {"body": case}))
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


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    coarse = harmonised(np.ones((8, 8, 8)), ("liver",), ("liver",), spacing_mm=1.5)
    store = write_anatomies(tmp_path / "coarse", {"one": coarse})
    with pytest.raises(UsageError, match=r"open/one is stored at 1.5 mm; .* --spacing 2"):
        load_anatomies(store)
    many = harmonised(np.ones((8, 8, 8)), [f"part {i}" for i in range(250)], ("liver",))
    with pytest.raises(UsageError, match="has 251 labels; at most 240"):
        load_anatomies(write_anatomies(tmp_path / "many", {"one": many}))


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


@pytest.mark.slow
def test_a_phantom_annotates_every_class() -> None:
    anatomy = phantom_anatomy(0)
    assert anatomy.annotated == NAMES
    assert anatomy.skin_mm is None and anatomy.ct is None
    assert not {*LESION_HOSTS} & set(anatomy.centres)  # views grow them
    assert len(anatomy.centres) > 20


def test_nothing_to_draw_from_is_an_error(tmp_path: Path) -> None:
    store = write_paired_organs(tmp_path / "one")
    with pytest.raises(UsageError, match="1 cases, of which 1 are held out"):
        load_anatomies(store, held_out=frozenset({"open/pair"}))
    with pytest.raises(UsageError, match="0 cases"):
        load_anatomies(store, datasets=("04",))
    never = write_anatomies(
        tmp_path / "never", {"one": harmonised(np.ones((8, 8, 8)), ("liver",), ("liver",))}, 0.0
    )
    with pytest.raises(UsageError, match="what has weight 0"):
        load_anatomies(never)


@pytest.mark.slow
def test_the_open_data(open_data: Path, tmp_path: Path) -> None:
    prepare(
        [("open-data", open_data)],
        tmp_path / "store",
        spacing_mm=FINE_MM,
        femoral_heads=True,
        progress=False,
    )
    held_out = frozenset({"open-data/totalsegmentator_example"})
    anatomies = {
        anatomy.name.removeprefix("open-data/"): anatomy
        for anatomy in load_anatomies(Store(tmp_path / "store"), held_out=held_out)
    }
    assert "totalsegmentator_example" not in anatomies and len(anatomies) == 9
    for name, anatomy in anatomies.items():
        assert anatomy.label_map.dtype == np.uint8
        assert anatomy.centres or "crops" in name
        assert set(anatomy.centres) <= set(anatomy.annotated)
        if anatomy.ct is not None:
            assert anatomy.ct.shape == anatomy.label_map.shape
            assert anatomy.ct.min() < -800 and anatomy.ct.max() > 300
            aorta = membership_of(anatomy.sets, ["aorta"])[anatomy.label_map, 0]
            assert not aorta.any() or anatomy.ct[aorta].mean() > 30
    body = anatomies["totalsegmentator_s0328"]
    heads = [body.centres[f"femur_head_{side}"] for side in ("left", "right")]
    assert heads[0][:, 0].max() < heads[1][:, 0].min()
    for head in heads:
        assert np.ptp(head, axis=0).max() * FINE_MM < 2 * 27 + 2
    liver = anatomies["totalsegmentator_liver_vessels"]
    vessels = [names for names in liver.sets.values() if "hepatic_vessel" in names]
    assert vessels and all("liver" in names for names in vessels)
    assert anatomies["visible_human_male"].has_skin
