"""One scan harmonised: geometry, HU, classes, sides, lesions in their organ, overlaps, unknown."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from foundation.data import Dataset, paper_datasets
from foundation.data.layouts import Patterns
from foundation.data.store.harmonise import Harmonised, Settings, harmonise
from foundation.errors import VolumeError
from foundation.synthesis import phantom
from foundation.taxonomy import NAMES, PAIRED, TOTALSEGMENTATOR, by_name

DATASETS = paper_datasets()

MM = 4.0


@dataclass(frozen=True)
class Scan:
    """As `foundation.data.Scan`."""

    ct: Any
    affine: Any
    labels: Any
    names: tuple[tuple[str, ...], ...]


def numbered(labels: np.ndarray, ct: np.ndarray | None = None, mm: float = MM) -> Scan:
    """A label map of plain numbers, RAS."""
    names = ((), *((str(v),) for v in range(1, int(labels.max()) + 1)))
    return Scan(ct, np.diag([mm, mm, mm, 1.0]), labels, names)


def labelled(label_map: dict[Any, tuple[str, ...]], annotated: tuple[str, ...]) -> Dataset:
    return Dataset("x", "x", label_map, annotated, Patterns((), ()))


def run(scan: Scan, dataset: Dataset, mm: float = MM, **more: Any) -> Harmonised:
    annotated = more.pop("annotated", dataset.annotated)
    unknown = more.pop("unknown", ())
    return harmonise(scan, dataset.label_map, annotated, unknown, Settings(mm, **more))


def mask(case: Harmonised, name: str) -> np.ndarray:
    """Voxels of a class."""
    return np.isin(case.labels, [v for v, names in enumerate(case.sets) if name in names])


@cache
def body(seed: int = 0, lesions: bool = False) -> phantom.Phantom:
    return phantom.generate(seed, MM, lesions=lesions)


def ct_of(labels: np.ndarray) -> np.ndarray:
    lungs = [phantom.TISSUES.index(f"lung_{side}") for side in ("left", "right")]
    return np.where(labels == 0, -1000, np.where(np.isin(labels, lungs), -850, 40)).astype(
        np.float32
    )


def painted(values: dict[str, int], seed: int = 0, lesions: bool = False) -> np.ndarray:
    """The phantom with these tissues under these label values, all else 0."""
    table = np.zeros(len(phantom.TISSUES), np.uint8)
    for name, value in values.items():
        table[phantom.TISSUES.index(name)] = value
    return table[body(seed, lesions).label_map]


# --- geometry -----------------------------------------------------------------------------------

TURNED = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])  # oblique by 16°
ORIENTATIONS = ["RAS", "LPS", "LAS", "PIR", "SAL", "ILP"]


def oriented(axes: str, spacing: tuple[float, ...], turn: np.ndarray) -> np.ndarray:
    """An affine whose file axes run as `axes` says."""
    columns = np.zeros((3, 3))
    for file_axis, letter in enumerate(axes):
        ras_axis = next(i for i, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        columns[ras_axis, file_axis] = 1 if letter in "RAS" else -1
    affine = np.eye(4)
    affine[:3, :3] = turn @ columns * spacing
    affine[:3, 3] = (-31.5, 12.25, 80)
    return affine


def centre_mm(weights: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.asarray(nib.affines.apply_affine(affine, ndimage.center_of_mass(weights)))


@pytest.mark.parametrize("axes", ORIENTATIONS)
@pytest.mark.parametrize("spacing", [(0.7, 0.8, 5.0), (1.5, 1.5, 1.5), (3.0, 2.0, 0.5)])
@pytest.mark.parametrize("turn", [np.eye(3), TURNED], ids=["straight", "oblique"])
def test_a_landmark_keeps_its_place_in_mm(
    axes: str, spacing: tuple[float, ...], turn: np.ndarray
) -> None:
    affine = oriented(axes, spacing, turn)
    labels = np.zeros((41, 36, 30), np.uint8)
    labels[21:31, 8:17, 6:24] = 1
    ct = np.where(labels, 400, -1000).astype(np.float32)
    scan = Scan(ct, affine, labels, ((), ("1",)))
    case = run(scan, DATASETS["03"], 1.5)
    truth = centre_mm(labels, affine)
    assert case.ct is not None
    np.testing.assert_allclose(centre_mm(case.ct + 1000.0, case.affine), truth, atol=0.1)
    np.testing.assert_allclose(centre_mm(case.labels, case.affine), truth, atol=0.8)
    volume = labels.sum() * np.prod(spacing)
    assert case.labels.sum() * 1.5**3 == pytest.approx(volume, rel=0.12)
    np.testing.assert_allclose(np.linalg.norm(case.affine[:3, :3], axis=0), 1.5)
    assert "".join(nib.aff2axcodes(case.affine)) == "RAS"
    assert case.labels.shape == case.ct.shape


def test_a_mirrored_file_gives_the_mirrored_case() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, (40, 30, 20)).astype(np.uint8)
    ct = rng.normal(0, 100, labels.shape).astype(np.float32)
    dataset = DATASETS["10_08"]
    dataset = replace(dataset, label_map={**dataset.label_map, 3: ("liver",)})
    scan = Scan(ct, np.diag([0.75, 0.75, 2, 1.0]), labels, ((), ("1",), ("2",), ("3",)))
    mirrored = replace(scan, ct=ct[::-1], labels=labels[::-1])
    one, other = run(scan, dataset, 1.5), run(mirrored, dataset, 1.5)
    np.testing.assert_array_equal(one.labels, other.labels[::-1])
    np.testing.assert_array_equal(one.ct, other.ct[::-1])


def test_at_its_own_spacing_nothing_changes() -> None:
    labels = painted({"liver": 1})
    ct = ct_of(body().label_map)
    case = run(numbered(labels, ct), DATASETS["03"])
    np.testing.assert_array_equal(case.labels, labels)
    np.testing.assert_array_equal(case.ct, ct)
    np.testing.assert_allclose(case.affine, np.diag([MM, MM, MM, 1]))


def test_thin_structures_keep_their_volume() -> None:
    """A vessel of 1 mm in a grid of 3 mm, where a majority would erase it."""
    labels = np.zeros((120, 120, 30), np.uint8)
    for k in range(10, 110):
        labels[k, (7 * k) % 119, :] = 1
    case = run(numbered(labels, mm=1.0), DATASETS["10_08"], 3.0)
    assert (case.labels > 0).sum() * 27 == pytest.approx((labels > 0).sum(), rel=0.25)


def test_hu_are_averaged_and_padding_is_clipped_first() -> None:
    ct = np.zeros((40, 40, 40), np.float32)
    ct[::2] = 100
    ct[:, :, :20] = -3024
    ct[0, 0, 30] = 30000
    case = run(numbered(np.zeros(ct.shape, np.uint8), ct, 1.0), DATASETS["03"], 2.0)
    assert case.ct is not None
    assert case.ct.dtype == np.int16
    assert (case.ct[:, :, :9] == -1024).all()
    assert (case.ct[2:, :, 11:] == 50).all()
    assert case.ct.max() <= 3071


# --- classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("id_", list(DATASETS))
def test_every_label_of_every_dataset_becomes_its_classes(id_: str) -> None:
    """Small cubes in a row from foot to head."""
    dataset = DATASETS[id_]
    keys = list(dataset.label_map)
    labels = np.zeros((12, 12, 6 * len(keys) + 6), np.uint8)
    for number in range(len(keys)):
        labels[4:8, 4:8, 6 * number + 3 : 6 * number + 7] = number + 1
    scan = Scan(None, np.diag([1.0] * 4), labels, ((), *((str(key),) for key in keys)))
    case = run(scan, dataset, 1.0)
    assert case.labels.dtype == np.uint8
    for number, key in enumerate(keys):
        value = case.labels[5, 5, 6 * number + 4]
        own = dataset.label_map[key]
        positive = {*own, *(organ for name in own for organ in by_name(name).parents)}
        if own in PAIRED.values():
            sides = set(case.sets[value]) & set(dataset.label_map[key])
            told = set(case.annotated) & set(dataset.label_map[key])
            # Told where another label shows the body's middle, and then one side, not two.
            assert (len(sides), len(told)) in ((0, 0), (1, 2))
        else:
            # A lesion's kidney is one of the two that the dataset may stand for.
            assert set(dataset.label_map[key]) & set(dataset.annotated) <= set(case.sets[value])
            assert set(case.sets[value]) <= positive | {"liver"}
    assert set(case.annotated) <= set(dataset.annotated)
    assert case.sets[0] == ()


def test_a_tumour_is_also_its_organ_where_that_is_annotated() -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:15, 5:15, 5:15] = 1
    labels[8:11, 8:11, 8:11] = 2
    lits = run(numbered(labels), DATASETS["04"])
    assert mask(lits, "liver").sum() == 1000
    assert mask(lits, "liver_tumor").sum() == 27
    assert lits.tissues == ("", "liver", "liver_tumor")
    vessels = run(numbered(labels), DATASETS["10_08"])  # its liver is unknown
    assert vessels.sets == ((), ("hepatic_vessel",), ("hepatic_vessel_tumor",))


def test_a_vessel_is_in_the_liver_where_that_is_annotated() -> None:
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[2:7] = 1
    labels[4] = 2
    dataset = labelled({"liver": ("liver",), "hepatic_veins": ("hepatic_vessel",)},
        ("liver", "hepatic_vessel"),
    )  # fmt: skip
    scan = replace(numbered(labels), names=((), ("liver",), ("hepatic_veins",)))
    case = run(scan, dataset)
    assert case.sets == ((), ("liver",), ("liver", "hepatic_vessel"))
    assert case.tissues == ("", "liver", "hepatic_veins")


def test_only_annotated_classes_are_kept() -> None:
    labels = painted({"liver": 6, "spleen": 1, "aorta": 8})
    case = run(numbered(labels), DATASETS["01"], annotated=("liver",))
    assert case.annotated == ("liver",)
    assert {name for names in case.sets for name in names} == {"liver"}
    assert mask(case, "liver").sum() == body().mask("liver").sum()


def test_overlapping_structures_survive() -> None:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[2:6] = 1
    labels[6:8] = 2
    labels[5] = 3
    scan = replace(
        numbered(labels), names=((), ("liver",), ("stomach", "other"), ("liver", "stomach"))
    )
    dataset = labelled({"liver": ("liver",), "stomach": ("stomach",)}, ("liver", "stomach"))
    case = run(scan, dataset)
    assert mask(case, "liver").sum() == 400
    assert mask(case, "stomach").sum() == 300
    assert (mask(case, "liver") & mask(case, "stomach")).sum() == 100
    assert case.tissues == ("", "liver", "stomach+other", "liver+stomach")


def test_classes_of_the_users_own_and_labels_without_class() -> None:
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[2], labels[3], labels[4] = 1, 2, 3
    scan = replace(numbered(labels), names=((), ("L1",), ("muscle",), ("spleen",)))
    dataset = labelled({"L1": ("vertebra L1",)}, ("vertebra L1",))
    case = run(scan, dataset)
    assert case.sets == ((), ("vertebra L1",), (), ())
    assert case.tissues == ("", "L1", "muscle", "spleen")
    assert case.annotated == ("vertebra L1",)


def test_unknown_voxels() -> None:
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[2], labels[3], labels[4] = 1, 2, 3
    scan = replace(numbered(labels), names=((), ("1",), ("7",), ("1", "7")))
    case = run(scan, DATASETS["03"], unknown=("7",))
    assert case.unknown == (2,), "what lies under a label with a class is known"
    assert case.sets[3] == ("liver",)


def test_more_than_256_values() -> None:
    count = 600
    labels = np.arange(count, dtype=np.uint16).reshape(10, 10, 6)
    names = ((), *((f"part {v}",) for v in range(1, count)))
    case = run(Scan(None, np.eye(4), labels, names), DATASETS["03"], 1.0)
    assert case.labels.dtype == np.uint16
    assert case.tissues[599] == "part 599"
    np.testing.assert_array_equal(case.labels, labels)


# --- sides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAL"])
def test_merged_pairs_are_split_in_any_orientation(axes: str) -> None:
    """CT-ORG merges kidneys and lungs."""
    organs = {"kidney_left": 4, "kidney_right": 4, "lung_left": 3, "lung_right": 3, "liver": 1}
    image = nib.Nifti1Image(painted(organs), body().affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
    )
    turned = image.as_reoriented(turn)
    whole = nib.Nifti1Image(body().label_map, body().affine).as_reoriented(turn)
    scan = Scan(
        ct_of(np.asarray(whole.dataobj)),
        turned.affine,
        np.asarray(turned.dataobj),
        ((), ("1",), ("2",), ("3",), ("4",)),
    )
    case = run(scan, DATASETS["12"])
    np.testing.assert_allclose(case.affine, body().affine)
    for name in ("kidney_left", "kidney_right", "lung_left", "lung_right"):
        np.testing.assert_array_equal(mask(case, name), body().mask(name))
        assert name in case.annotated
        assert name in case.tissues
    assert not case.notes


def test_tumour_and_cyst_go_to_the_kidney_they_lie_in() -> None:
    seed = next(s for s in range(20) if body(s, True).mask("kidney_tumor").any())
    values = {"kidney_left": 1, "kidney_right": 1, "kidney_tumor": 2, "kidney_cyst": 3}
    case = run(
        numbered(painted(values, seed, True), ct_of(body(seed, True).label_map)), DATASETS["05"]
    )
    right, left = mask(case, "kidney_right"), mask(case, "kidney_left")
    tumour = mask(case, "kidney_tumor")
    np.testing.assert_array_equal(tumour, body(seed, True).mask("kidney_tumor"))
    assert not (right & left).any()
    assert ((right | left)[tumour]).all()
    assert "kidney_tumor" in case.tissues
    # Without lesions, the same anatomy's kidneys have the voxels that tumour and cyst took.
    for side, found in (("right", right), ("left", left)):
        plain = body(seed, False).mask(f"kidney_{side}")
        overlap = 2 * (found & plain).sum() / (found.sum() + plain.sum())
        assert overlap > 0.9


def test_a_lesion_beside_kidneys_whose_sides_are_labelled() -> None:
    labels = painted({"kidney_right": 1, "kidney_left": 2})
    cyst = ndimage.binary_dilation(labels == 2, iterations=2) & (labels == 0)
    labels[cyst] = 3
    dataset = labelled({1: ("kidney_right",), 2: ("kidney_left",), 3: ("kidney_cyst",)},
        ("kidney_right", "kidney_left", "kidney_cyst"),
    )  # fmt: skip
    case = run(numbered(labels), dataset)
    assert mask(case, "kidney_left")[cyst].all()
    assert not mask(case, "kidney_right")[cyst].any()


def test_a_cyst_named_by_its_side_is_in_that_kidney() -> None:
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[4] = 1
    scan = replace(numbered(labels), names=((), ("kidney_cyst_right",)))
    dataset = labelled({"kidney_cyst_right": ("kidney_cyst",)},
        ("kidney_right", "kidney_left", "kidney_cyst"),
    )  # fmt: skip
    assert run(scan, dataset).sets[1] == ("kidney_right", "kidney_cyst")


@pytest.mark.parametrize("side", ["right", "left"])
def test_half_a_body_gets_no_side_unless_its_spine_tells(side: str) -> None:
    middle = round(float(-body().affine[0, 3] / MM))
    half = slice(middle - 6, None) if side == "right" else slice(None, middle + 6)
    labels = painted({"kidney_left": 2, "kidney_right": 2, "vertebrae": 9})[half].copy()
    ct = ct_of(body().label_map[half])
    names = ((), ("1",), ("2",), *((),) * 6, ("vertebrae_L1",))
    told = run(Scan(ct, np.diag([MM, MM, MM, 1]), labels, names), DATASETS["08"])
    np.testing.assert_array_equal(mask(told, f"kidney_{side}"), body().mask(f"kidney_{side}")[half])
    assert {"kidney_left", "kidney_right"} <= set(told.annotated)

    labels[labels == 9] = 0
    silent = run(Scan(ct, np.diag([MM, MM, MM, 1]), labels, names), DATASETS["08"])
    assert not {"kidney_left", "kidney_right"} & set(silent.annotated)
    assert not mask(silent, "kidney_left").any()
    assert not mask(silent, "kidney_right").any()
    assert "kidney" in silent.tissues
    assert any("kidney" in note for note in silent.notes)


# --- femoral heads --------------------------------------------------------------------------------


def test_femoral_heads_are_derived_on_request() -> None:
    """The phantom has heads of its own: give them to the femurs and find them again."""
    names = ["hip_left", "hip_right", "femur_left", "femur_right"]
    values = {name: number for number, name in enumerate(names, start=1)}
    labels = painted({**values, "femur_head_left": 3, "femur_head_right": 4})
    scan = replace(numbered(labels), names=((), *((name,) for name in names)))
    dataset = labelled({k: (v,) for k, v in TOTALSEGMENTATOR.items()},
        tuple(n for n in NAMES if "femur" not in n),
    )  # fmt: skip
    assert "femur_head_left" not in run(scan, dataset).annotated
    case = run(scan, dataset, femoral_heads=True)
    for side in ("left", "right"):
        name = f"femur_head_{side}"
        found, truth = mask(case, name), body().mask(name)
        assert name in case.annotated
        assert name in case.tissues
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.8
        femur = np.isin(labels, [values[f"femur_{side}"]])
        assert femur[found].all()
    # A scan that ends below the joint has no head to derive.
    low = np.flatnonzero((labels == values["femur_left"]).any(axis=(0, 1)))[0] + 2
    below = replace(scan, labels=np.ascontiguousarray(labels[:, :, :low]))
    assert "femur_head_left" not in run(below, dataset, femoral_heads=True).annotated


# --- what can be wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ct": np.zeros((5, 5, 5), np.float32)}, "share one grid"),
        ({"ct": np.full((9, 9, 9), np.nan, np.float32)}, "NaN"),
        ({"ct": np.full((9, 9, 9), 7, np.float32)}, "every voxel is 7"),
        ({"labels": np.zeros((9, 9), np.uint8)}, "along X, Y and Z"),
        ({"labels": np.zeros((9, 9, 9), np.int32)}, "uint8 or uint16"),
        ({"labels": np.full((9, 9, 9), 5, np.uint8)}, "values 5 have no name"),
    ],
)
def test_a_broken_scan_is_refused(change: dict[str, Any], message: str) -> None:
    scan = replace(numbered(np.ones((9, 9, 9), np.uint8)), **change)
    with pytest.raises(VolumeError, match=message):
        run(scan, DATASETS["03"])


def test_a_case_without_any_label_says_so() -> None:
    case = run(Scan(None, np.eye(4), np.zeros((9, 9, 9), np.uint8), ((),)), DATASETS["03"])
    assert case.notes == ("No voxel belongs to any annotated class.",)
    assert case.annotated == ("liver",)
