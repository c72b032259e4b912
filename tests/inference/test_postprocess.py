"""The clean-up rules, and the faults of the published ones that they must not have."""

import numpy as np
import pytest

from foundation.inference.postprocess import PAIRS, largest, partners, postprocess

SHAPE = (40, 30, 20)
MM = (1.5, 1.5, 1.5)
MIDDLE = 19.5


def box(x: tuple[int, int], y: tuple[int, int] = (5, 15), z: tuple[int, int] = (5, 15)):
    mask = np.zeros(SHAPE, bool)
    mask[slice(*x), slice(*y), slice(*z)] = True
    return mask


EMPTY = np.zeros(SHAPE, bool)
RIGHT, LEFT = box((25, 35)), box((5, 15))  # RAS: the patient's right has the larger index


def clean(masks, middle=MIDDLE):
    return {**masks, **dict(postprocess(masks, masks.get, spacing_mm=MM, middle=middle))}


@pytest.mark.parametrize("name", ["liver", "spleen", "pancreas", "urinary_bladder", "celiac_trunk"])
def test_organs_keep_their_largest_component(name):
    organ, speck = box((5, 15)), box((30, 33), (5, 8), (5, 8))
    assert np.array_equal(clean({name: organ | speck})[name], organ)


def test_26_neighbours_count_as_connected():
    diagonal = np.zeros(SHAPE, bool)
    for i in range(3, 12):
        diagonal[i, i, i] = True
    assert np.array_equal(largest(diagonal), diagonal)


def test_the_first_of_two_equal_components_stays():
    twins = box((2, 6)) | box((20, 24))
    assert np.array_equal(largest(twins), box((2, 6)))


def test_a_colon_cut_by_the_scan_keeps_both_its_sides():
    ascending, descending, speck = box((30, 36)), box((4, 9)), box((20, 21), (20, 21), (9, 10))
    cleaned = clean({"colon": ascending | descending | speck})["colon"]
    assert np.array_equal(cleaned, ascending | descending)


def test_classes_without_a_rule_stay_as_they_are():
    scattered = box((5, 8)) | box((20, 29))
    masks = {
        name: scattered for name in ("hepatic_vessel", "lung_tumor", "kidney_cyst", "my_class")
    }
    assert dict(postprocess(masks, masks.get, spacing_mm=MM, middle=MIDDLE)) == {}


# --- portal and splenic vein ---------------------------------------------------------------------


def test_vein_ends_at_the_lowest_slice_of_the_pancreas():
    vein, pancreas = box((10, 12), z=(2, 18)), box((15, 20), z=(6, 12))
    cleaned = clean({"portal_vein_and_splenic_vein": vein, "pancreas": pancreas})
    assert np.array_equal(cleaned["portal_vein_and_splenic_vein"], box((10, 12), z=(6, 18)))


@pytest.mark.parametrize("others", [{"pancreas": EMPTY}, {}])
def test_vein_without_a_pancreas_stays(others):
    vein = box((10, 12), z=(2, 18))
    cleaned = clean({"portal_vein_and_splenic_vein": vein, **others})
    assert np.array_equal(cleaned["portal_vein_and_splenic_vein"], vein)


def test_vein_never_disappears_wholly():
    vein, pancreas = box((10, 12), z=(2, 5)), box((15, 20), z=(10, 14))
    cleaned = clean({"portal_vein_and_splenic_vein": vein, "pancreas": pancreas})
    assert cleaned["portal_vein_and_splenic_vein"].any()


# --- left and right ------------------------------------------------------------------------------


@pytest.mark.parametrize("right,left", PAIRS)
def test_each_side_keeps_its_organ(right, left):
    cleaned = clean({right: RIGHT, left: LEFT})
    assert np.array_equal(cleaned[right], RIGHT)
    assert np.array_equal(cleaned[left], LEFT)


@pytest.mark.parametrize("right,left", PAIRS)
@pytest.mark.parametrize("swapped", [True, False])
def test_mixed_up_sides_are_put_right(right, left, swapped):
    masks = {right: LEFT, left: RIGHT} if swapped else {right: LEFT | RIGHT, left: EMPTY}
    cleaned = clean(masks)
    assert np.array_equal(cleaned[right], RIGHT)
    assert np.array_equal(cleaned[left], LEFT)


def test_touching_lungs_survive():
    # As the network gave them: one component together, each under its own name.
    right, left = box((20, 36)), box((4, 20))
    cleaned = clean({"lung_right": right, "lung_left": left})
    assert np.array_equal(cleaned["lung_right"], right)
    assert np.array_equal(cleaned["lung_left"], left)


def test_touching_lungs_under_one_name_are_divided_at_the_middle():
    cleaned = clean({"lung_right": box((4, 36)), "lung_left": EMPTY})
    assert np.array_equal(cleaned["lung_right"], box((20, 36)))
    assert np.array_equal(cleaned["lung_left"], box((4, 20)))


def test_a_lung_may_reach_over_the_middle():
    right = box((18, 36))
    assert np.array_equal(clean({"lung_right": right, "lung_left": EMPTY})["lung_right"], right)


@pytest.mark.parametrize("side", [RIGHT, LEFT])
@pytest.mark.parametrize("given", ["lung_right", "lung_left"])
def test_a_single_visible_lung_survives_on_its_side(side, given):
    masks = {"lung_right": EMPTY, "lung_left": EMPTY, given: side}
    cleaned = clean(masks)
    true, other = ("lung_right", "lung_left") if side is RIGHT else ("lung_left", "lung_right")
    assert np.array_equal(cleaned[true], side)
    assert not cleaned[other].any()


def test_without_a_midline_sides_stay_as_the_network_gave_them():
    # A crop around the right kidney, which lies left in the crop.
    cleaned = clean({"kidney_right": LEFT, "kidney_left": EMPTY}, middle=None)
    assert np.array_equal(cleaned["kidney_right"], LEFT)


def test_one_half_of_a_pair_alone_keeps_its_largest():
    cleaned = clean({"kidney_left": LEFT | box((30, 32), (20, 22), (2, 4))})
    assert np.array_equal(cleaned["kidney_left"], LEFT)


# --- tumours -------------------------------------------------------------------------------------


def test_tumour_stays_in_and_near_its_organ_only():
    liver = box((5, 15))
    inside, near, far = box((6, 8), (6, 8), (6, 8)), box((15, 17)), box((30, 33))
    cleaned = clean({"liver": liver, "liver_tumor": inside | near | far})
    assert np.array_equal(cleaned["liver_tumor"], inside | near)  # 3 mm are two voxels


def test_tumour_fills_a_gap_in_its_organ():
    liver = box((5, 20)) & ~box((10, 13), (8, 12), (8, 12))  # the network left the tumour out
    tumour = box((10, 13), (8, 12), (8, 12))
    assert np.array_equal(clean({"liver": liver, "liver_tumor": tumour})["liver_tumor"], tumour)


def test_kidney_tumour_may_lie_in_either_kidney():
    tumour = box((26, 28)) | box((6, 8))
    masks = {"kidney_right": RIGHT, "kidney_left": LEFT, "kidney_tumor": tumour}
    assert np.array_equal(clean(masks)["kidney_tumor"], tumour)


@pytest.mark.parametrize("organ", [{"liver": EMPTY}, {}])
def test_tumour_without_its_organ_stays(organ):
    tumour = box((6, 9))
    assert np.array_equal(clean({"liver_tumor": tumour, **organ})["liver_tumor"], tumour)


# --- everything ----------------------------------------------------------------------------------


def test_empty_masks_stay_empty_without_error():
    names = ("liver", "colon", "liver_tumor", "pancreas", "portal_vein_and_splenic_vein")
    masks = {name: EMPTY for name in (*names, *(side for pair in PAIRS for side in pair))}
    assert not any(mask.any() for mask in clean(masks).values())


def test_rules_do_not_write_into_their_input():
    masks = {
        "kidney_right": LEFT | RIGHT,
        "kidney_left": EMPTY.copy(),
        "liver": box((1, 4)) | RIGHT,
    }
    before = {name: mask.copy() for name, mask in masks.items()}
    clean(masks)
    assert all(np.array_equal(masks[name], before[name]) for name in masks)


def test_partners_name_what_the_rules_look_at():
    assert partners(["kidney_tumor"]) == ("kidney_left", "kidney_right")
    assert partners(["lung_left"]) == ("lung_right",)
    assert partners(["portal_vein_and_splenic_vein"]) == ("pancreas",)
    assert partners(["spleen", "my_class"]) == ()
