"""The generated phantom: physical statements about its anatomy."""

import numpy as np
import pytest
from scipy import ndimage

from foundation.errors import UsageError
from foundation.synthesis.phantom import TISSUES, Phantom, generate
from foundation.taxonomy import NAMES

# The classes of the taxonomy that the phantom draws under TotalSegmentator's name.
RENAMED = {"intestine": "small_bowel"}
PARENTS = {
    "kidney_tumor": ("kidney_left", "kidney_right"),
    "kidney_cyst": ("kidney_left", "kidney_right"),
    "liver_tumor": ("liver", "hepatic_vessel"),
    "hepatic_vessel_tumor": ("liver", "hepatic_vessel"),
    "pancreas_tumor": ("pancreas",),
    "lung_tumor": ("lung_left", "lung_right"),
    "colon_tumor": ("colon",),
}


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [generate(seed, spacing_mm=6.0) for seed in range(20)]


def centre_mm(phantom: Phantom, name: str) -> np.ndarray | None:
    voxels = np.argwhere(phantom.mask(name))
    if not len(voxels):
        return None
    return phantom.affine[:3, :3] @ voxels.mean(axis=0) + phantom.affine[:3, 3]


def volume_ml(phantom: Phantom, name: str) -> float:
    return float(phantom.mask(name).sum() * np.prod(phantom.spacing_mm) / 1000)


def test_every_class_of_the_taxonomy_occurs(phantoms: list[Phantom]) -> None:
    drawn = {RENAMED.get(name, name) for name in NAMES}
    assert drawn <= set(TISSUES)
    seen = {p.names[value] for p in phantoms for value in np.unique(p.label_map)}
    assert seen == set(TISSUES)


def test_label_map_is_small_integers_with_names(phantoms: list[Phantom]) -> None:
    for p in phantoms:
        assert p.label_map.dtype == np.uint8
        assert p.names[0] == "air"
        assert set(np.unique(p.label_map)) <= set(p.names)
        assert p.affine[:3, :3].tolist() == np.diag(p.spacing_mm).tolist()


def test_sides_are_true_in_ras(phantoms: list[Phantom]) -> None:
    for p in phantoms:
        liver, spine = centre_mm(p, "liver"), centre_mm(p, "vertebrae")
        spleen = centre_mm(p, "spleen")
        assert spleen is None or liver[0] > spine[0] > spleen[0]
        for name in TISSUES:
            if name.endswith("_right") and (right := centre_mm(p, name)) is not None:
                assert right[0] > spine[0], name
                left = centre_mm(p, name.removesuffix("right") + "left")
                assert left is None or left[0] < spine[0], name


def test_organs_lie_in_front_of_and_above_one_another(phantoms: list[Phantom]) -> None:
    for p in phantoms:
        at = {name: centre_mm(p, name) for name in TISSUES}
        assert at["spinal_cord"][1] < at["vertebrae"][1] < at["aorta"][1] < at["stomach"][1]
        assert at["rectum"][1] < at["urinary_bladder"][1]
        order = ("urinary_bladder", "small_bowel", "pancreas", "liver", "heart")
        heights = [at[name][2] for name in order]
        assert heights == sorted(heights)
        assert abs(at["femur_head_left"][2] - at["femur_head_right"][2]) < 20


def test_air_surrounds_one_body(phantoms: list[Phantom]) -> None:
    for p in phantoms:
        body = p.label_map > 0
        assert not (body[[0, -1]].any() or body[:, [0, -1]].any())
        assert ndimage.label(body)[1] == 1
        for k in range(body.shape[2]):  # no hole of outside air inside the body
            assert (ndimage.binary_fill_holes(body[..., k]) == body[..., k]).all()


@pytest.mark.parametrize(
    ("name", "low_ml", "high_ml"),
    [
        ("liver", 700, 3000),
        ("kidney_right", 30, 450),
        ("aorta", 50, 250),
        ("pancreas", 15, 160),
        ("urinary_bladder", 20, 700),
        ("colon", 120, 2000),
        ("esophagus", 5, 80),
    ],
)
def test_volumes_are_those_of_adults(
    phantoms: list[Phantom], name: str, low_ml: float, high_ml: float
) -> None:
    volumes = [volume_ml(p, name) for p in phantoms if p.mask(name).any()]
    assert low_ml < min(volumes) and max(volumes) < high_ml
    assert np.std(volumes) / np.mean(volumes) > 0.05  # anatomies differ


def test_organs_are_missing_sometimes_and_sexes_differ(phantoms: list[Phantom]) -> None:
    for name in ("gallbladder", "prostate", "uterus"):
        assert 0 < sum(p.mask(name).any() for p in phantoms) < len(phantoms)
    assert not any(p.mask("prostate").any() and p.mask("uterus").any() for p in phantoms)
    assert all(p.mask("kidney_left").any() or p.mask("kidney_right").any() for p in phantoms)


@pytest.mark.parametrize("lesion", sorted(PARENTS))
def test_lesions_touch_their_organ(phantoms: list[Phantom], lesion: str) -> None:
    ill = [p for p in phantoms if p.mask(lesion).sum() > 3]
    assert ill
    for p in ill:
        near = ndimage.binary_dilation(p.mask(lesion), iterations=1)
        assert any((near & p.mask(parent)).any() for parent in PARENTS[lesion]), p.seed


def test_lesions_only_take_voxels_of_the_healthy_anatomy() -> None:
    lesions = [TISSUES.index(name) for name in PARENTS]
    for seed in range(3):
        ill, healthy = generate(seed, 8.0), generate(seed, 8.0, lesions=False)
        assert not np.isin(healthy.label_map, lesions).any()
        changed = ill.label_map != healthy.label_map
        assert (np.isin(ill.label_map, lesions) == changed).all()


def test_a_seed_is_one_anatomy() -> None:
    first, second, other = generate(5, 8.0), generate(5, 8.0), generate(6, 8.0)
    assert (first.label_map == second.label_map).all()
    assert (
        first.label_map.shape != other.label_map.shape or (first.label_map != other.label_map).any()
    )


@pytest.mark.parametrize("seed", [0, 4])
def test_spacing_samples_the_same_anatomy(seed: int) -> None:
    coarse, fine = generate(seed, 6.0), generate(seed, 3.0)
    for name in ("liver", "spleen", "kidney_left", "stomach", "colon", "aorta", "muscle", "fat"):
        assert volume_ml(coarse, name) == pytest.approx(volume_ml(fine, name), rel=0.08), name
        assert centre_mm(coarse, name) == pytest.approx(centre_mm(fine, name), abs=3), name


def test_wrong_requests_say_what_is_allowed() -> None:
    with pytest.raises(UsageError, match=r"spacing_mm is 0.*0\.5 to 20"):
        generate(0, 0.0)
    with pytest.raises(UsageError, match="seed is -1"):
        generate(-1)
    with pytest.raises(UsageError, match="Unknown tissue 'livr'"):
        generate(0, 12.0).mask("livr")
