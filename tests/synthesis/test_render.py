"""Synthetic CTs: physical statements about what is rendered."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn import functional

from foundation.synthesis import render as synthesis
from foundation.synthesis import scanner
from foundation.synthesis.phantom import TISSUES as PHANTOM_TISSUES
from foundation.synthesis.render import (
    PHASES,
    TISSUES,
    _fill_unlabelled,
    render_ct,
    tissue_kind,
)
from foundation.taxonomy import NAMES

SPACING_MM = 2.0
CUBE = 12  # voxels

VERTEBRAE = (*(f"C{i}" for i in range(1, 8)), *(f"T{i}" for i in range(1, 13)), "L1", "L5", "S1")
INTENDED = {
    "bone": "sacrum hip_left hip_right femur_left femur_head_right humerus_left scapula_right "
    "clavicula_left skull sternum rib_left_1 rib_right_12 ribs "
    + " ".join(f"vertebrae_{level}" for level in VERTEBRAE),
    "cartilage": "costal_cartilages",
    "muscle": "gluteus_maximus_left gluteus_medius_right gluteus_minimus_left autochthon_left "
    "iliopsoas_right muscle",
    "lung": "lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_right "
    "lung_middle_lobe_right lung_lower_lobe_right",
    "trachea": "trachea",
    "heart": "heart heart_myocardium heart_atrium_left heart_ventricle_right atrial_appendage_left",
    "artery": "aorta iliac_artery_left brachiocephalic_trunk subclavian_artery_right "
    "common_carotid_artery_left pulmonary_artery pulmonary_vein celiac_trunk "
    "superior_mesenteric_artery",
    "vein": "inferior_vena_cava superior_vena_cava iliac_vena_left brachiocephalic_vein_left",
    "portal": "portal_vein_and_splenic_vein portal_vein_branches hepatic_veins hepatic_vessel",
    "bowel": "esophagus stomach duodenum small_bowel colon rectum vermiform_appendix",
    "kidney": "kidney_left kidney_right",
    "kidney_cyst": "kidney_cyst_left kidney_cyst_right kidney_cyst",
    "kidney_tumor": "kidney_tumor",
    "liver_tumor": "liver_tumor hepatic_vessel_tumor",
    "lung_tumor": "lung_tumor",
    "adrenal": "adrenal_gland_left adrenal_gland_right",
    "bladder": "urinary_bladder",
    "soft": "face something_unknown",
    **{name: name for name in ("fat", "skin", "liver", "spleen", "pancreas", "gallbladder")},
    **{name: name for name in ("prostate", "uterus", "brain", "spinal_cord")},
}


def only_phase(phase: str) -> tuple[float, ...]:
    return tuple(float(name == phase) for name in PHASES)


def cubes(names: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
    """A row of cubes along X, one a tissue."""
    values = np.arange(1, len(names) + 1, dtype=np.uint8)
    row = np.repeat(values, CUBE)[:, None, None]
    return np.tile(row, (1, CUBE, CUBE)), dict(enumerate(names, start=1))


def cube_means_hu(names: Sequence[str], seeds: int) -> dict[str, np.ndarray]:
    """HU in the middle of each tissue's cube, seed by seed."""
    label_map, by_value = cubes(names)
    inner = slice(CUBE // 2 - 3, CUBE // 2 + 3)
    means = []
    for seed in range(seeds):
        ct = render_ct(label_map, by_value, SPACING_MM, np.random.default_rng(seed))
        blocks = ct.reshape(len(names), CUBE, CUBE, CUBE)
        means.append(blocks[:, inner, inner, inner].mean((1, 2, 3)))
    return dict(zip(names, np.array(means).T, strict=True))


@pytest.mark.parametrize("kind", INTENDED)
def test_names_are_rendered_as_the_tissue_they_are(kind: str) -> None:
    assert kind in TISSUES
    assert {name: tissue_kind(name) for name in INTENDED[kind].split()} == dict.fromkeys(
        INTENDED[kind].split(), kind
    )


def test_every_tissue_of_the_phantom_and_every_class_has_a_row_of_its_own() -> None:
    known = {"air", "intestine"}  # intestine: `small_bowel` in every label map
    named = ({*PHANTOM_TISSUES} | {*NAMES}) - known
    assert [name for name in sorted(named) if tissue_kind(name) == "soft"] == []


@pytest.mark.parametrize(
    ("phase", "darker_first"),
    [
        ("native", ("lung_left", "fat", "gallbladder", "muscle", "vertebrae_L1")),
        ("arterial", ("fat", "gallbladder", "muscle", "kidney_left", "aorta")),
        (
            "portal_venous",
            ("fat", "kidney_cyst", "muscle", "liver", "portal_vein_and_splenic_vein"),
        ),
        ("delayed", ("fat", "gallbladder", "pancreas", "inferior_vena_cava", "kidney_left")),
    ],
)
def test_order_of_tissues_in_each_phase(
    phase: str, darker_first: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "PHASE_PROBABILITIES", only_phase(phase))
    hu = cube_means_hu(darker_first, seeds=24)
    medians = [float(np.median(hu[name])) for name in darker_first]
    assert medians == sorted(medians)
    # Now and then grey values are drawn that no protocol gives.
    assert (hu[darker_first[0]] < hu[darker_first[-1]]).mean() > 0.9


def test_contrast_fills_the_aorta_first_and_the_liver_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    median = {}
    for phase in PHASES:
        monkeypatch.setattr(synthesis, "PHASE_PROBABILITIES", only_phase(phase))
        hu = cube_means_hu(("aorta", "liver", "fat"), seeds=24)
        median[phase] = {name: float(np.median(values)) for name, values in hu.items()}
    aorta, liver, fat = ({p: median[p][name] for p in PHASES} for name in ("aorta", "liver", "fat"))
    assert max(aorta, key=lambda p: aorta[p]) == "arterial"
    assert max(liver, key=lambda p: liver[p]) == "portal_venous"
    assert min(aorta, key=lambda p: aorta[p]) == min(liver, key=lambda p: liver[p]) == "native"
    assert all(-130 < value < -85 for value in fat.values())  # fat takes up no contrast


def test_label_0_is_air_and_air_is_the_minimum() -> None:
    label_map = np.zeros((20, 24, 20), np.uint8)
    label_map[4:16, 4:14, 4:16] = 1
    for seed in range(8):
        ct = render_ct(label_map, {1: "muscle"}, SPACING_MM, np.random.default_rng(seed))
        front = ct[:, 18:]  # the table lies behind
        assert front.mean() == pytest.approx(-1000, abs=30)
        assert front.mean() < ct[7:13, 7:11, 7:13].mean() - 800


def test_a_ct_has_the_range_and_type_of_a_ct() -> None:
    label_map, names = cubes(("vertebrae_L1", "lung_left", "colon"))
    ct = render_ct(label_map, names, SPACING_MM, np.random.default_rng(0))
    assert ct.dtype == np.float32
    assert ct.shape == label_map.shape
    assert ct.min() >= -1024 and ct.max() <= 3071
    assert np.isfinite(ct).all()


def test_a_seed_is_one_ct() -> None:
    label_map, names = cubes(("liver", "stomach", "ribs"))
    first, again, other = (
        render_ct(label_map, names, SPACING_MM, np.random.default_rng(seed)) for seed in (4, 4, 5)
    )
    assert (first == again).all()
    assert (first != other).mean() > 0.9


def test_pool_averages_what_a_voxel_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "scan", lambda ct, *_: ct)  # no blur, no noise
    label_map = np.zeros((9, 9, 9), np.uint8)
    label_map[:4] = 1  # ends inside the second of three coarse voxels: a third of it is fat
    ct = render_ct(label_map, {1: "fat"}, SPACING_MM, np.random.default_rng(0), pool=3)
    assert ct.shape == (3, 3, 3)
    fat, between, air = ct.mean((1, 2))
    assert air == -1000
    assert between == pytest.approx(fat / 3 - 1000 * 2 / 3, abs=15)


def test_gas_lies_in_the_front_of_the_colon_and_its_wall_may_be_thin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(synthesis, "scan", lambda ct, *_: ct)
    label_map = np.zeros((24, 24, 24), np.uint8)
    label_map[2:22, 2:22, 2:22] = 1
    lumen = np.zeros(label_map.shape, bool)
    lumen[3:21, 3:21, 3:21] = True
    wall = (label_map == 1) & ~lumen
    shares, heights, walls = [], [], []
    for seed in range(30):
        ct = render_ct(label_map, {1: "colon"}, SPACING_MM, np.random.default_rng(seed))
        gas = lumen & (ct < -900)
        walls.append(ct[wall].min())
        shares.append(gas[lumen].mean())
        if gas.any():
            heights.append(np.argwhere(gas)[:, 1].mean() - 11.5)
    assert 0.1 < np.mean(shares) < 0.5
    assert max(shares) > 0.5 and min(shares) < 0.1
    assert np.mean(heights) > 2  # voxels towards +Y
    assert min(walls) > -961  # a wall thinner than a voxel is mixed with the gas behind it
    assert 0.3 < np.mean(np.array(walls) > -100) < 0.95  # others are seen whole


def test_a_thick_slice_is_a_mean_along_z() -> None:
    ct = torch.zeros(3, 3, 21)
    ct[..., 10] = 1
    thick = scanner._thicken(ct, 2.5)
    assert thick[1, 1, 8:13].tolist() == pytest.approx([0, 0.3, 0.4, 0.3, 0])
    assert thick.sum() == pytest.approx(9)


def test_metal_throws_streaks_in_its_own_slices() -> None:
    ct = torch.full((40, 40, 60), 40.0)
    ct[20, 20, 30] = 400.0  # the only bone
    scanner._add_implant(ct, 2.0, np.random.default_rng(0))
    assert ct[20, 20, 30] == 3000 and (ct == 3000).sum() > 20
    changed = ((ct - 40).abs() > 1).any(0).any(0).nonzero().flatten()
    assert 10 < changed.min() < 30 < changed.max() < 60
    no_bone = torch.zeros(8, 8, 8)
    scanner._add_implant(no_bone, 2.0, np.random.default_rng(0))
    assert not no_bone.any()


def test_contrast_goes_to_vessels_and_organs_and_not_to_fat_or_bone() -> None:
    names = {1: "aorta", 2: "kidney_left", 3: "fat", 4: "vertebrae_L1", 5: "colon"}
    shifts = np.stack(
        [synthesis.contrast_shift(names, np.random.default_rng(seed)) for seed in range(60)]
    )
    spread = shifts.std(0)
    assert spread[1] > 50 and spread[2] > 20
    assert spread[3] < 8 and spread[4] == spread[5] == spread[0] == 0


def test_contrast_reaches_the_cortex_of_the_kidney_first() -> None:
    labels = torch.zeros(30, 30, 30, dtype=torch.int32)
    labels[5:25, 5:25, 5:25] = 1
    ct = torch.full(labels.shape, 150.0)
    for seed in range(20):
        rng, everywhere = np.random.default_rng(seed), torch.ones(labels.shape)
        synthesis._render_medulla(ct, labels, {0: "air", 1: "kidney"}, everywhere, 1, 2.0, rng)
    assert ct[5:25, 5:25, 5].min() == 150 and ct[:5].min() == 150
    assert ct[15, 15, 15] < 100


def test_bones_have_a_dense_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "scan", lambda ct, *_: ct)
    label_map = np.zeros((16, 16, 16), np.uint8)
    label_map[3:13, 3:13, 3:13] = 1
    for seed in range(6):
        ct = render_ct(label_map, {1: "vertebrae_L1"}, SPACING_MM, np.random.default_rng(seed))
        assert ct[3, 4:12, 4:12].mean() > ct[5:11, 5:11, 5:11].mean() + 50


def test_the_body_wall_is_layered_from_outside_in() -> None:
    depth_mm = torch.tensor([-30.0, -0.1, 1.0, 2.4, 2.6, 19.0, 21.0, 31.0, 33.0, 90.0])
    labels = torch.zeros(len(depth_mm), 1, 1, dtype=torch.int32)
    labels[-1] = 7  # labelled: it stays
    fill = {"skin": 1, "fat": 2, "muscle": 3, "soft": 4, "fluid": 5}
    still = torch.zeros(labels.shape)
    layers_mm = (depth_mm[:, None, None], 20.0, 12.0)
    noise = (still, still, still)
    bare, covered = (
        _fill_unlabelled(labels, fill, layers_mm, cover, noise, np.random.default_rng(0))
        for cover in (still.bool(), ~still.bool())
    )
    assert bare.flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 2, 7]
    # Muscle lies on what is labelled, but in no skin, and in no air.
    assert covered.flatten().tolist() == [0, 0, 1, 1, 2, 3, 3, 3, 3, 7]
    assert not labels[:-1].any()  # the given label map is left as it was


def test_muscle_covers_what_is_labelled_and_lies_thicker_on_bones() -> None:
    labels = torch.zeros(40, 40, 40, dtype=torch.int32)
    labels[5, 5, 5], labels[30, 30, 30] = 1, 2
    kinds = {0: "air", 1: "liver", 2: "bone"}
    still = torch.zeros(labels.shape)
    reached = {1: 0, 2: 0}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        cover = synthesis._draw_cover(labels, kinds, 2.0, (still, still, still), rng)
        for value, place in ((1, 5), (2, 30)):
            near = cover[place - 4 : place + 9, place, place]
            assert not near.any() or (near[3] and near[5]), "without a gap"
            reached[value] = max(reached[value], int(near.sum()))
        assert not cover[18:20].any()
    assert 3 <= reached[1] <= 9 < reached[2], "at most 8 and 16 mm to either side"


@pytest.mark.parametrize("reach", [1, 3, 50])
def test_a_grown_mask_is_its_cube(reach: int) -> None:
    mask = torch.zeros(20, 9, 7, dtype=torch.bool)
    mask[10, 4, 0] = True
    expected = functional.max_pool3d(mask[None].float(), 2 * min(reach, 20) + 1, 1, min(reach, 20))
    assert torch.equal(synthesis._grown(mask, reach), expected[0] > 0)


def test_depth_turns_unlabelled_voxels_into_a_body() -> None:
    label_map = np.zeros((40, 12, 12), np.uint8)
    depth_mm = torch.linspace(-40, 40, 40)[:, None, None].expand(40, 12, 12)
    rng = np.random.default_rng(1)
    ct = render_ct(label_map, {}, SPACING_MM, rng, depth_mm=depth_mm, fat_mm=25, muscle_mm=10)
    assert ct[:12].mean() < -900
    assert -200 < np.median(ct[24:30]) < -40  # fat
