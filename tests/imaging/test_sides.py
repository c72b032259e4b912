"""Left and right of merged pairs, on phantoms whose sides are known."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from foundation.imaging.body import (
    FOREGROUND_HU,
    body_box,
    fill_axial_holes,
    midline_from_ct,
    midline_from_labels,
)
from foundation.imaging.sides import (
    LEFT,
    RIGHT,
    UNDECIDED,
    correct_sides,
    nearest_side,
    split_sides,
)
from foundation.synthesis import phantom

MM = 4.0
SEEDS = (0, 1, 2, 5)  # bodies with both kidneys
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@cache
def body(seed: int) -> phantom.Phantom:
    return phantom.generate(seed, MM, lesions=False)


def both(seed: int, organ: str) -> tuple[Mask, Mask]:
    return body(seed).mask(f"{organ}_right"), body(seed).mask(f"{organ}_left")


def ct_of(seed: int) -> np.ndarray:
    """HU good enough for an outline: air, lungs, soft tissue."""
    labels = body(seed).label_map
    hu = np.where(labels > 0, 40, -1000).astype(np.int16)
    for lung in both(seed, "lung"):
        hu[lung] = -850
    return hu


def middle_of(hu: np.ndarray) -> float | None:
    return midline_from_ct(hu, MM)


@cache
def found_middle(seed: int) -> float | None:
    return middle_of(ct_of(seed))


def true_middle(seed: int) -> float:
    """The body frame's origin lies midway between the femoral heads."""
    return float(-body(seed).affine[0, 3] / MM)


def agreement(sides: np.ndarray, right: Mask, left: Mask) -> float:
    """Share of the organ's voxels that got their own side."""
    correct = (sides[right] == RIGHT).sum() + (sides[left] == LEFT).sum()
    return float(correct / (right.sum() + left.sum()))


# --- the middle -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_middle_is_found_from_the_ct(seed: int) -> None:
    middle = found_middle(seed)
    assert middle is not None
    assert abs(middle - true_middle(seed)) * MM < 12


def test_a_table_and_an_arm_do_not_move_the_middle() -> None:
    hu = ct_of(0)
    alone = middle_of(hu)
    x, _, z = hu.shape
    hu = np.pad(hu, ((0, 40), (12, 0), (0, 0)), constant_values=-1000)
    hu[x // 2 :, 2:4] = 200  # a plate under the patient, to one side
    hu[x + 4 : x + 20, 40:58] = 40  # an arm on the right …
    hu[x - 12 : x + 6, 44:54, : z // 2] = 40  # … whose elbow touches the trunk
    assert alone is not None
    found = middle_of(hu)
    assert found is not None
    assert abs(found - alone) <= 2


def test_no_middle_is_made_up_where_the_width_of_the_body_is_unknown() -> None:
    hu = ct_of(0)
    middle = round(true_middle(0))
    assert middle_of(hu[middle:]) is None, "the right half only"
    assert middle_of(hu[: middle + 8]) is None, "the left half and a little more"
    assert middle_of(hu[middle - 15 : middle + 5]) is None, "a box inside the body"
    assert middle_of(np.full((40, 40, 40), -1000, np.int16)) is None, "only air"


def test_a_scan_that_cuts_off_both_flanks_keeps_its_middle() -> None:
    hu = ct_of(1)
    wide = np.flatnonzero((hu > -500).any(axis=(1, 2)))
    cut = (wide[-1] - wide[0]) // 16
    first = wide[0] + cut
    found = middle_of(hu[first : wide[-1] - cut])
    assert found is not None
    assert abs(found + first - true_middle(1)) * MM < 12


def boxed(x: tuple[int, int], y: tuple[int, int] = (5, 25)) -> np.ndarray:
    hu = np.full((40, 30, 20), -1000, np.float32)
    hu[slice(*x), slice(*y)] = 40
    return hu


def test_the_middle_is_that_of_the_body_not_of_the_scan() -> None:
    body, table = boxed((10, 31)), boxed((0, 36), (0, 1))
    assert midline_from_ct(body, MM) == pytest.approx(20)
    assert midline_from_ct(np.maximum(body, table), MM) == pytest.approx(20)


def test_no_middle_where_the_scan_cuts_the_body_off() -> None:
    assert midline_from_ct(boxed((0, 30)), MM) is None
    assert midline_from_ct(boxed((10, 40)), MM) is None


def test_the_middle_does_not_depend_on_the_grid() -> None:
    hu = ct_of(0)
    fine = hu.repeat(2, axis=0).repeat(4, axis=2)  # 2, 4 and 1 mm
    middle, found = middle_of(hu), midline_from_ct(fine, (MM / 2, MM, MM / 4))
    assert middle is not None and found == pytest.approx(2 * middle, abs=1)


def test_the_box_around_the_body() -> None:
    box = body_box(boxed((10, 31)))
    assert box == (slice(10, 31), slice(5, 25), slice(0, 20))
    assert body_box(np.full((4, 4, 4), FOREGROUND_HU, np.float32)) is None


@pytest.mark.parametrize("shape", [(9, 7, 5), (40, 30, 12), (1, 5, 3), (3, 3, 1)])
def test_holes_are_filled_in_each_axial_plane(shape: tuple[int, int, int]) -> None:
    for share in (0.3, 0.6, 0.9):
        mask = np.random.default_rng(0).random(shape) < share
        planes = [ndimage.binary_fill_holes(plane) for plane in np.moveaxis(mask, 2, 0)]
        assert np.array_equal(fill_axial_holes(mask), np.stack(planes, axis=2))


@pytest.mark.parametrize(
    "tissues",
    [("vertebrae",), ("spinal_cord",), ("hip_left", "hip_right"), ("aorta", "inferior_vena_cava")],
)
def test_the_middle_is_found_from_labels(tissues: tuple[str, ...]) -> None:
    names = [(name,) if name in tissues else () for name in phantom.TISSUES]
    for seed in SEEDS:
        middle = midline_from_labels(body(seed).label_map, names)
        assert middle is not None
        assert abs(middle - true_middle(seed)) * MM < 15


def test_labels_that_are_cut_off_tell_no_middle() -> None:
    names = [(n,) if n in ("hip_left", "hip_right") else () for n in phantom.TISSUES]
    hip = np.flatnonzero(body(0).mask("hip_right").any(axis=(1, 2)))
    cut = body(0).label_map[: (hip[0] + hip[-1]) // 2]
    assert midline_from_labels(cut, names) is None
    assert midline_from_labels(np.zeros((4, 4, 4), np.uint8), [()]) is None


# --- two organs -------------------------------------------------------------------------------


@pytest.mark.parametrize("organ", ["kidney", "adrenal_gland", "lung", "femur_head"])
@pytest.mark.parametrize("with_ct", [True, False])
def test_two_organs_get_their_sides(organ: str, with_ct: bool) -> None:
    for seed in SEEDS:
        right, left = both(seed, organ)
        middle = found_middle(seed) if with_ct else None
        sides = split_sides(right | left, MM, middle, cut_at_waist=organ == "lung")
        assert agreement(sides, right, left) == 1
        assert not sides[~(right | left)].any()


def test_two_kidneys_of_a_body_that_lies_turned() -> None:
    """The middle of the outline runs through the left kidney: they are still two."""
    right, left = both(0, "kidney")
    beside = float(np.argwhere(left)[:, 0].mean()) - 3
    sides = split_sides(right | left, MM, beside, cut_at_waist=False)
    assert agreement(sides, right, left) == 1


# --- one organ --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("organ", ["kidney", "adrenal_gland", "lung"])
def test_a_single_organ_lands_on_its_side(organ: str, side: str) -> None:
    for seed in SEEDS:
        mask = body(seed).mask(f"{organ}_{side}")
        sides = split_sides(mask, MM, found_middle(seed), cut_at_waist=organ == "lung")
        assert set(np.unique(sides[mask])) == {RIGHT if side == "right" else LEFT}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_single_kidney_wherever_the_patient_lies_in_the_scan(side: str) -> None:
    """Air on one side only: the scan's own middle says nothing."""
    mask, hu = body(0).mask(f"kidney_{side}"), ct_of(0)
    for before, after in ((80, 0), (0, 80)):
        wide = np.pad(hu, ((before, after), (0, 0), (0, 0)), constant_values=-1000)
        moved = np.pad(mask, ((before, after), (0, 0), (0, 0)))
        sides = split_sides(moved, MM, middle_of(wide), cut_at_waist=False)
        assert set(np.unique(sides[moved])) == {RIGHT if side == "right" else LEFT}


def test_a_pelvic_kidney_across_the_middle_stays_whole() -> None:
    mask = np.zeros((80, 60, 60), bool)
    x, y, z = np.ogrid[:80, :60, :60]
    mask[(x - 43) ** 2 / 15**2 + (y - 30) ** 2 / 7**2 + (z - 30) ** 2 / 7**2 < 1] = True
    sides = split_sides(mask, MM, 40.0, cut_at_waist=False)
    assert set(np.unique(sides[mask])) == {RIGHT}


def test_a_lone_organ_without_a_middle_gets_no_side() -> None:
    mask = body(0).mask("kidney_left")
    sides = split_sides(mask, MM, None, cut_at_waist=False)
    assert set(np.unique(sides[mask])) == {UNDECIDED}


# --- two organs in one component -----------------------------------------------------------------


def bridged(right: Mask, left: Mask, thick: int) -> Mask:
    """Both organs with a bridge between their nearest parts."""
    inner_right, inner_left = np.argwhere(right)[0], np.argwhere(left)[-1]
    bridge = np.zeros_like(right)
    for share in np.linspace(0, 1, 400):
        x, y, z = np.rint(inner_left + share * (inner_right - inner_left)).astype(int)
        bridge[x, y - thick : y + thick, z - thick : z + thick] = True
    return np.asarray(right | left | bridge)


@pytest.mark.parametrize("with_ct", [True, False])
def test_touching_lungs_are_split_where_they_are_narrowest(with_ct: bool) -> None:
    for seed in SEEDS:
        right, left = both(seed, "lung")
        merged = bridged(right, left, 2)
        assert np.bincount(ndimage.label(merged)[0].ravel())[1:].max() > 0.99 * merged.sum()
        middle = found_middle(seed) if with_ct else None
        sides = split_sides(merged, MM, middle, cut_at_waist=True)
        assert agreement(sides, right, left) > 0.98
        assert (sides[merged] > 0).all()


def test_a_lung_that_reaches_over_the_middle_alone_stays_whole() -> None:
    right, _ = both(0, "lung")
    inner = int(np.argwhere(right)[:, 0].min())
    sides = split_sides(right, MM, float(inner + 6), cut_at_waist=True)
    assert set(np.unique(sides[right])) == {RIGHT}


def test_a_horseshoe_kidney_is_split_at_the_middle() -> None:
    for seed in SEEDS:
        right, left = both(seed, "kidney")
        merged, middle = bridged(right, left, 2), found_middle(seed)
        assert middle is not None
        assert np.bincount(ndimage.label(merged)[0].ravel())[1:].max() > 0.99 * merged.sum()
        sides = split_sides(merged, MM, middle, cut_at_waist=False)
        where = np.broadcast_to(np.arange(merged.shape[0])[:, None, None], merged.shape)
        assert (sides[merged] == np.where(where[merged] > middle, RIGHT, LEFT)).all()
        assert agreement(sides, right, left) > 0.98


# --- small pieces -----------------------------------------------------------------------------


def test_debris_goes_with_the_organ_it_lies_at() -> None:
    """Also across the middle: a crumb of a kidney that was moved over to it."""
    right, left = both(0, "kidney")
    inner = np.argwhere(right)[0]
    debris = np.zeros_like(right)
    debris[inner[0] - 3 : inner[0] - 1, inner[1], inner[2]] = True
    sides = split_sides(right | left | debris, MM, float(inner[0]), cut_at_waist=False)
    assert set(np.unique(sides[debris])) == {RIGHT}


def test_the_tip_of_the_other_kidney_keeps_its_side() -> None:
    """A field of view that ends at the tip of the left kidney: small, and far from the right."""
    right, left = both(0, "kidney")
    tip = left.copy()
    tip[:, :, : np.flatnonzero(left.any(axis=(0, 1)))[-1]] = False
    assert tip.sum() < 0.05 * right.sum()
    for middle in (found_middle(0), true_middle(0)):
        sides = split_sides(right | tip, MM, middle, cut_at_waist=False)
        assert agreement(sides, right, tip) == 1


def test_nothing_to_split() -> None:
    assert not split_sides(np.zeros((4, 4, 4), bool), MM, 2.0, cut_at_waist=True).any()


def test_a_lesion_takes_the_side_of_the_labelled_organ_beside_it() -> None:
    right, left = both(0, "kidney")
    near_right = ndimage.binary_dilation(right, iterations=2) & ~right
    sides = nearest_side(near_right, right, left)
    assert (sides[near_right] == RIGHT).all()
    assert not nearest_side(near_right, right & False, left & False).any()


# --- two names --------------------------------------------------------------------------------


@pytest.mark.parametrize("organ", ["kidney", "adrenal_gland", "lung", "femur_head"])
@pytest.mark.parametrize("mixed", ["correct", "swapped", "all right", "all left", "twice", "bands"])
def test_organs_go_to_the_side_they_lie_on(organ: str, mixed: str) -> None:
    for seed in SEEDS:
        right, left = both(seed, organ)
        whole, none = right | left, right & False
        bands = np.broadcast_to(np.arange(right.shape[2]) // 3 % 2 == 0, right.shape)
        given = {
            "correct": (right, left),
            "swapped": (left, right),
            "all right": (whole, none),
            "all left": (none, whole),
            "twice": (whole, whole),  # the prompts of two sides are nearly the same
            "bands": (np.where(bands, right, left), np.where(bands, left, right)),
        }[mixed]
        middle = found_middle(seed)
        assert middle is not None
        found = correct_sides(*given, MM, middle, cut_at_waist=organ == "lung")
        assert np.array_equal(found[0] | found[1], whole) and not (found[0] & found[1]).any()
        correct = ((found[0] & right).sum() + (found[1] & left).sum()) / whole.sum()
        assert correct > 0.98, (organ, seed, correct)


def test_names_keep_touching_organs_apart() -> None:
    right, left, tongue = (np.zeros((40, 20, 20), bool) for _ in range(3))
    right[20:36, 5:15, 5:15] = True
    left[4:20, 5:15, 5:15] = True
    tongue[14:20, 8:11, 8:11] = True  # of the right lung, into the left one
    right, left = right | tongue, left & ~tongue
    assert ndimage.label(right | left)[1] == 1
    found = correct_sides(right, left, MM, 19.5, cut_at_waist=True)
    assert np.array_equal(found[0], right) and np.array_equal(found[1], left)
    cut = split_sides(right | left, MM, 19.5, cut_at_waist=True)  # without names they are one
    assert not np.array_equal(cut == RIGHT, right)


def test_a_component_that_spans_both_sides_is_divided() -> None:
    mask = np.zeros((40, 20, 20), bool)
    mask[4:36, 5:15, 5:15] = True
    right, left = correct_sides(mask, mask & False, MM, 19.5, cut_at_waist=True)
    assert right[20:36, 5:15, 5:15].all() and left[4:20, 5:15, 5:15].all()
    assert (right | left).sum() == mask.sum()


def test_correcting_sides_loses_no_voxel() -> None:
    random = np.random.default_rng(0).random((40, 30, 20))
    right, left = random > 0.8, (random < 0.1) | (random > 0.95)
    found = correct_sides(right, left, 1.5, 19.5, cut_at_waist=False)
    assert np.array_equal(found[0] | found[1], right | left)
    assert not (found[0] & found[1]).any()
    empty = correct_sides(right & False, left & False, 1.5, 19.5, cut_at_waist=False)
    assert not empty[0].any() and not empty[1].any()
