"""The 32 classes, their names, and the datasets' label maps."""

import re
import subprocess
import sys

import pytest

from foundation import taxonomy
from foundation.errors import UsageError
from foundation.taxonomy import CLASSES, DATASETS, NAMES, PAIRED, TOTALSEGMENTATOR, by_name, resolve

# The paper's list, in its own words and order, 1-based.
PAPER = """spleen, right kidney, left kidney, gall bladder, esophagus, liver, stomach, aorta,
postcava, portal vein and splenic vein, pancreas, right adrenal gland, left adrenal gland, duodenum,
hepatic vessel, right lung, left lung, colon, intestine, rectum, bladder, prostate,
left head of femur, right head of femur, celiac trunk, kidney tumor, liver tumor, pancreas tumor,
hepatic vessel tumor, lung tumor, colon tumor, kidney cyst"""
PAPER_NAMES = [name.strip() for name in PAPER.replace("\n", " ").split(",")]

# Dataset → the paper's numbers it annotates.
ANNOTATED = {
    "01": "1,2,3,4,5,6,7,8,9,10,11,12,13,14",
    "01_2": "1,3,4,5,6,7,11,14",
    "02": "1,3,4,5,6,7,11,14",
    "03": "6",
    "04": "6,27",
    "05": "2,3,26,32",
    "06": "1,2,3,4,6,7,11,16,17",
    "07": "1,2,3,4,5,6,7,11,12,13,14,18,19,20,21,23,24",
    "08": "1,2,3,6,11",
    "09": "1,2,3,4,5,6,7,8,9,11,12,13,14,21,22",
    "10_03": "6,27",
    "10_06": "30",
    "10_07": "11,28",
    "10_08": "15,29",
    "10_09": "1",
    "10_10": "31",
    "12": "2,3,6,16,17,21",
    "13": "1,2,3,4,5,6,7,8,9,11,12,13,25",
    "15_v2": "1,2,3,4,5,6,7,8,9,10,11,12,13,14,16,17,18,19,21,22,32",
}


def test_classes_stand_in_the_papers_order():
    assert [resolve(name) for name in PAPER_NAMES] == list(NAMES)
    assert [c.number for c in CLASSES] == list(range(1, 33))
    assert sum(c.kind == "organ" for c in CLASSES) == 25


def test_right_comes_first_except_for_the_femoral_heads():
    sides = {pair: [by_name(n).laterality for n in names] for pair, names in PAIRED.items()}
    right_first = ["right", "left"]
    assert sides["kidney"] == sides["adrenal_gland"] == sides["lung"] == right_first
    assert sides["femur_head"] == ["left", "right"]
    for first, second in PAIRED.values():
        assert NAMES.index(second) == NAMES.index(first) + 1
    paired = {name for names in PAIRED.values() for name in names}
    assert {c.name for c in CLASSES if c.laterality} == paired


def test_every_lesion_lies_in_an_organ():
    parents = {c.name: c.parents for c in CLASSES if c.kind == "lesion"}
    assert parents == {
        "kidney_tumor": ("kidney_right", "kidney_left"),
        "liver_tumor": ("liver",),
        "pancreas_tumor": ("pancreas",),
        "hepatic_vessel_tumor": ("liver",),
        "lung_tumor": ("lung_right", "lung_left"),
        "colon_tumor": ("colon",),
        "kidney_cyst": ("kidney_right", "kidney_left"),
    }


def test_published_prompt_names_keep_their_typing_errors():
    assert by_name("aorta").prompt_name == "Arota"
    assert by_name("celiac_trunk").prompt_name == "Celiac Truck"


def test_colours_and_codes_differ():
    colours = [c.colour for c in CLASSES]
    nearest = min(
        max(abs(a - b) for a, b in zip(x, y, strict=True))
        for i, x in enumerate(colours)
        for y in colours[:i]
    )
    assert nearest >= 12
    codes = [c.snomed for c in CLASSES if c.snomed]
    assert len(set(codes)) == len(codes)
    assert all(_verhoeff(code) for code in codes)


def _verhoeff(code: str) -> bool:
    """SNOMED CT identifiers end in a Verhoeff check digit: a mistyped one fails."""

    def times(a: int, b: int) -> int:  # the dihedral group of the pentagon
        if a < 5:
            return (a + b) % 5 if b < 5 else 5 + (a + b) % 5
        return 5 + (a - b) % 5 if b < 5 else (a - b) % 5

    check, order = 0, list(range(10))
    for digit in reversed(code):
        check = times(check, order[int(digit)])
        order = [(1, 5, 7, 6, 2, 8, 3, 0, 9, 4)[k] for k in order]
    return check == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Left Kidney", "kidney_left"),
        ("left_kidney", "kidney_left"),
        ("gall bladder", "gallbladder"),
        ("Gallbladder", "gallbladder"),
        ("oesophagus", "esophagus"),
        ("postcava", "inferior_vena_cava"),
        ("IVC", "inferior_vena_cava"),
        ("bladder", "urinary_bladder"),
        ("small bowel", "intestine"),
        ("small_bowel", "intestine"),
        ("Head of Femur, left", "femur_head_left"),
        ("coeliac trunk", "celiac_trunk"),
        ("liver tumour", "liver_tumor"),
        ("Arota", "aorta"),
    ],
)
def test_resolve_knows_other_names(name, expected):
    assert resolve(name) == expected


def test_names_displays_and_prompts_all_resolve_to_their_class():
    for c in CLASSES:
        assert {resolve(n) for n in (c.name, c.display, c.prompt_name, *c.aliases)} == {c.name}


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("aotra", "'aorta'"),
        ("kidneys", "'kidney_right' or 'kidney_left'"),
        ("lung", "'lung_right' or 'lung_left'"),
        ("femur_left", "'femur_head_left'"),
    ],
)
def test_unknown_names_get_a_suggestion(name, suggestion):
    expected = f"Unknown class {name!r}. Did you mean {suggestion}"
    with pytest.raises(UsageError, match=re.escape(expected) + ".*universal-ct classes"):
        resolve(name)


def test_nothing_similar_gets_no_suggestion():
    with pytest.raises(UsageError, match=r"Unknown class 'xyzzy'\. See `universal-ct classes`"):
        resolve("xyzzy")


def test_resolve_within_a_models_own_classes():
    assert resolve("portal vein", ["liver", "portal_vein"]) == "portal_vein"
    assert resolve("portal vein") == "portal_vein_and_splenic_vein"
    assert resolve("Renal Artery left", ["left_renal_artery"]) == "left_renal_artery"
    with pytest.raises(UsageError, match="'spleen' is not one of this model's 1 classes"):
        resolve("spleen", ["liver"])


def test_datasets_annotate_what_the_paper_says():
    numbers = {
        key: ",".join(str(by_name(n).number) for n in d.annotated) for key, d in DATASETS.items()
    }
    numbers.pop("15")
    assert numbers == ANNOTATED
    assert all(dataset.id == key for key, dataset in DATASETS.items())


def test_every_dataset_label_maps_to_classes():
    for dataset in DATASETS.values():
        mapped = {name for names in dataset.label_map.values() for name in names}
        assert mapped <= set(NAMES), dataset.name
        assert set(dataset.annotated) <= mapped, dataset.name
        for names in dataset.label_map.values():
            assert len(names) == 1 or names in PAIRED.values()


def test_source_label_orders():
    def label(key, value):
        return DATASETS[key].label_map[value]

    assert label("09", 10) == ("pancreas",)
    assert label("09", 15) == ("prostate",)
    assert label("07", 3) == ("kidney_left",)
    assert label("07", 15) == ("femur_head_left",)
    assert label("13", 12) == ("celiac_trunk",)
    assert label("12", 3) == ("lung_right", "lung_left")
    assert set(DATASETS["02"].label_map) == {1, 3, 4, 5, 6, 7, 11, 14}


def test_merged_pairs_are_marked_for_splitting():
    merged = {key: d.split_left_right for key, d in DATASETS.items() if d.split_left_right}
    assert merged == {"05": (1,), "07": (12,), "08": (2,), "12": (3, 4), "13": (2,)}


def test_a_lesions_voxels_belong_to_its_organ_where_that_is_annotated():
    assert DATASETS["04"].positive_classes(2) == ("liver_tumor", "liver")
    kits = DATASETS["05"]
    assert kits.positive_classes(2) == ("kidney_tumor", "kidney_right", "kidney_left")
    assert kits.positive_classes(3) == ("kidney_cyst", "kidney_right", "kidney_left")
    assert DATASETS["10_08"].positive_classes(2) == ("hepatic_vessel_tumor",)
    assert DATASETS["10_06"].positive_classes(1) == ("lung_tumor",)
    with pytest.raises(UsageError, match=r"LiTS has no label 3; its labels are \[1, 2\]"):
        DATASETS["04"].positive_classes(3)


def test_totalsegmentator_names():
    assert set(TOTALSEGMENTATOR.values()) <= set(NAMES)
    assert "femur_left" not in TOTALSEGMENTATOR  # more than its head
    assert TOTALSEGMENTATOR["lung_middle_lobe_right"] == "lung_right"


def test_the_taxonomy_imports_without_torch():
    code = "import sys, foundation.taxonomy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_alias_that_stands_for_two_classes_is_refused(monkeypatch):
    twice = [*CLASSES[:2], taxonomy.AnatomicalClass(2, "x", "X", "X", (0, 0, 0), ("spleen",))]
    monkeypatch.setattr(taxonomy, "CLASSES", twice)
    with pytest.raises(ValueError, match="'spleen' stands for two classes"):
        taxonomy._read_aliases()
