"""Labels as masks of classes: lesions in their organs, pairs without sides, what is unknown."""

import numpy as np

from foundation.data.cases import Scan
from foundation.data.reference import Reference, sides_of

KIDNEYS = ("kidney_right", "kidney_left")


def scan(names: tuple[tuple[str, ...], ...]) -> Scan:
    labels = np.zeros((12, 1, 1), np.uint8)
    labels[1:4, 0, 0], labels[4, 0, 0], labels[8:11, 0, 0], labels[11, 0, 0] = 1, 2, 3, 4
    return Scan(None, np.diag([2.0, 3.0, 4.0, 1.0]), labels, names)


def voxels(reference: Reference, name: str) -> list[int]:
    return np.flatnonzero(reference.mask(name)).tolist()


def test_a_lesion_belongs_to_its_organ_and_an_empty_class_is_labelled() -> None:
    label_map = {"1": ("liver",), "2": ("liver_tumor",), "9": ("spleen",)}
    found = Reference.of(
        scan(((), ("1",), ("2",), (), ("x",))), label_map, ["liver", "liver_tumor", "spleen"], ["x"]
    )
    assert found.classes == ("spleen", "liver", "liver_tumor")
    assert voxels(found, "liver") == [1, 2, 3, 4] and voxels(found, "liver_tumor") == [4]
    assert voxels(found, "spleen") == []
    assert found.known is not None and np.flatnonzero(~found.known).tolist() == [11]
    assert found.spacing_mm == (2.0, 3.0, 4.0)


def test_a_pair_that_the_labels_merge_is_one_class() -> None:
    label_map = {"1": KIDNEYS, "2": ("kidney_tumor",), "3": KIDNEYS}
    names = ((), ("1",), ("2",), ("3",), ())
    found = Reference.of(scan(names), label_map, [*KIDNEYS, "kidney_tumor"])
    assert found.classes == ("kidney", "kidney_tumor")
    assert voxels(found, "kidney") == [1, 2, 3, 4, 8, 9, 10], "with its tumour"
    assert found.known is None


def test_a_lesion_without_a_side_is_in_the_nearest_organ() -> None:
    label_map = {"1": ("kidney_left",), "2": ("kidney_tumor",), "3": ("kidney_right",)}
    names = ((), ("1",), ("2",), ("3",), ("2",))
    found = Reference.of(scan(names), label_map, [*KIDNEYS, "kidney_tumor"])
    assert voxels(found, "kidney_left") == [1, 2, 3, 4]
    assert voxels(found, "kidney_right") == [8, 9, 10, 11]


def test_a_pair_is_made_of_its_sides() -> None:
    assert sides_of("kidney", [*KIDNEYS]) == KIDNEYS
    assert sides_of("kidney", ["kidney_right"]) == () and sides_of("liver", ["spleen"]) == ()
    assert sides_of("kidney", ["kidney"]) == ("kidney",)
