"""The 32 classes and their names."""

import re
import subprocess
import sys

import pytest

from foundation import taxonomy
from foundation.errors import UsageError
from foundation.taxonomy import CLASSES, NAMES, PAIRED, TOTALSEGMENTATOR, by_name, resolve

# The paper's list, in its own words and order, 1-based.
PAPER = """spleen, right kidney, left kidney, gall bladder, esophagus, liver, stomach, aorta,
postcava, portal vein and splenic vein, pancreas, right adrenal gland, left adrenal gland, duodenum,
hepatic vessel, right lung, left lung, colon, intestine, rectum, bladder, prostate,
left head of femur, right head of femur, celiac trunk, kidney tumor, liver tumor, pancreas tumor,
hepatic vessel tumor, lung tumor, colon tumor, kidney cyst"""
PAPER_NAMES = [name.strip() for name in PAPER.replace("\n", " ").split(",")]


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
