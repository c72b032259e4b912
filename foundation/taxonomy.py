"""The 32 classes of the paper and the names they go by.

This is the one place with class names. The paper numbers its classes from 1; channels count from 0.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from foundation.errors import UsageError
from foundation.settings import suggestion


@dataclass(frozen=True)
class AnatomicalClass:
    """One class of the paper.

    Attributes:
        index: Its channel, counted from 0.
        name: The identifier that is used everywhere.
        display: The name for people.
        prompt_name: The name inside the published weights' prompt, typing errors included.
        colour: Red, green and blue, 0 to 255.
        aliases: Other names that it goes by.
        snomed: Its SNOMED CT code, only where that is certain.
        parent: The organ that a lesion lies in ("kidney" for either kidney; see `parents`).
    """

    index: int
    name: str
    display: str
    prompt_name: str
    colour: tuple[int, int, int]
    aliases: tuple[str, ...] = ()
    snomed: str | None = None
    parent: str | None = None

    @property
    def number(self) -> int:
        """The paper's number and the value in a label map: index + 1."""
        return self.index + 1

    @property
    def term(self) -> str:
        """The name as it stands in a sentence, e.g. "left kidney": what the prompt bank uses."""
        return self.display.lower()

    @property
    def kind(self) -> str:
        """ "lesion" for tumours and cysts, otherwise "organ"."""
        return "lesion" if self.parent else "organ"

    @property
    def laterality(self) -> str | None:
        """ "left", "right" or None."""
        return next((side for side in ("left", "right") if side in self.name.split("_")), None)

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of the classes that contain this lesion: both sides for a paired organ."""
        return () if self.parent is None else PAIRED.get(self.parent, (self.parent,))


# Paired organs under the name that merges both sides; right first, as the paper numbers them,
# except for the heads of the femurs.
PAIRED: dict[str, tuple[str, str]] = {
    "kidney": ("kidney_right", "kidney_left"),
    "adrenal_gland": ("adrenal_gland_right", "adrenal_gland_left"),
    "lung": ("lung_right", "lung_left"),
    "femur_head": ("femur_head_left", "femur_head_right"),
}

# name | display | published prompt name | colour | SNOMED CT or - | parent or - | other names
_TABLE = """
spleen | Spleen | Spleen | 9d6ca2 | 78961009 | - |
kidney_right | Right kidney | Right Kidney | b9662a | 9846003 | - | r kidney
kidney_left | Left kidney | Left Kidney | e0912f | 18639004 | - | l kidney
gallbladder | Gallbladder | Gall Bladder | 5fa052 | 28231008 | - | gall bladder
esophagus | Esophagus | Esophagus | d3a68b | 32849002 | - | gullet
liver | Liver | Liver | dd8265 | 10200004 | - |
stomach | Stomach | Stomach | d8847e | 69695003 | - |
aorta | Aorta | Arota | e02020 | 15825003 | - |
inferior_vena_cava | Inferior vena cava | Postcava | 2868c8 | 64131007 | - | postcava, ivc, vena cava, inferior caval vein
portal_vein_and_splenic_vein | Portal vein and splenic vein | Portal Vein and Splenic Vein | 3fb8d6 | - | - | portal and splenic vein, portal and splenic veins, portal vein, splenic vein
pancreas | Pancreas | Pancreas | f9d46a | 15776009 | - |
adrenal_gland_right | Right adrenal gland | Right Adrenal Gland | f46d9b | - | - | right adrenal, rag, right suprarenal gland
adrenal_gland_left | Left adrenal gland | Left Adrenal Gland | f7a8c4 | - | - | left adrenal, lag, left suprarenal gland
duodenum | Duodenum | Duodenum | ffc7a0 | 38848004 | - |
hepatic_vessel | Hepatic vessel | Hepatic Vessel | 4a4ae0 | - | - | hepatic vessels, liver vessel, liver vessels
lung_right | Right lung | Right Lung | 7fc8ff | 3341006 | - | r lung
lung_left | Left lung | Left Lung | b5e1ff | 44029006 | - | l lung
colon | Colon | Colon | b07a45 | 71854001 | - | large bowel, large intestine
intestine | Small intestine | Intestine | cda06e | 30315005 | - | intestine, intestines, small bowel
rectum | Rectum | Rectum | 8c5a3c | 34402009 | - |
urinary_bladder | Urinary bladder | Bladder | e8d820 | 89837001 | - | bladder
prostate | Prostate | Prostate | 8fd9c0 | 41216001 | - | prostate gland, prostate or uterus, prostate uterus
femur_head_left | Left femoral head | Left Head of Femur | e6dcc0 | - | - | left head of femur, head of left femur, head of femur l
femur_head_right | Right femoral head | Right Head of Femur | c8bc98 | - | - | right head of femur, head of right femur, head of femur r
celiac_trunk | Celiac trunk | Celiac Truck | ff7050 | 57850000 | - | celiac truck, celiac artery, celiac axis
kidney_tumor | Kidney tumor | Kidney Tumor | 7a0f5c | 126880001 | kidney | renal tumor, kidney cancer
liver_tumor | Liver tumor | Liver Tumor | 6b1f00 | 126851005 | liver | hepatic tumor, liver cancer, liver lesion
pancreas_tumor | Pancreas tumor | Pancreas Tumor | 8a6a00 | 126859007 | pancreas | pancreatic tumor, pancreas cancer, pancreatic lesion
hepatic_vessel_tumor | Hepatic vessel tumor | Hepatic Vessel Tumor | 2a0080 | - | liver |
lung_tumor | Lung tumor | Lung Tumor | 00507a | 126713003 | lung | pulmonary tumor, lung cancer
colon_tumor | Colon tumor | Colon Tumor | 4a2a08 | 126838000 | colon | colonic tumor, colon cancer, colon cancer primaries
kidney_cyst | Kidney cyst | Kidney Cyst | c060ff | - | kidney | renal cyst
"""  # noqa: E501


def _read_table() -> Iterable[AnatomicalClass]:
    for index, row in enumerate(_TABLE.strip().splitlines()):
        name, display, prompt, colour, snomed, parent, others = (
            cell.strip() for cell in row.split("|")
        )
        red, green, blue = bytes.fromhex(colour)
        yield AnatomicalClass(
            index=index,
            name=name,
            display=display,
            prompt_name=prompt,
            colour=(red, green, blue),
            aliases=tuple(alias.strip() for alias in others.split(",") if alias.strip()),
            snomed=None if snomed == "-" else snomed,
            parent=None if parent == "-" else parent,
        )


CLASSES: tuple[AnatomicalClass, ...] = tuple(_read_table())
NAMES: tuple[str, ...] = tuple(c.name for c in CLASSES)

# TotalSegmentator label name (v1, v2, subtasks) → our class. `femur_left` is not among them: the
# whole bone is more than `femur_head_left`. Heart, bones and muscles have no counterpart.
_SAME_NAMES = """
spleen kidney_right kidney_left gallbladder esophagus liver stomach aorta inferior_vena_cava
portal_vein_and_splenic_vein pancreas adrenal_gland_right adrenal_gland_left duodenum colon
urinary_bladder prostate rectum celiac_trunk
"""
TOTALSEGMENTATOR: dict[str, str] = {
    **{name: name for name in _SAME_NAMES.split()},
    "small_bowel": "intestine",
    "lung_upper_lobe_right": "lung_right",
    "lung_middle_lobe_right": "lung_right",
    "lung_lower_lobe_right": "lung_right",
    "lung_upper_lobe_left": "lung_left",
    "lung_lower_lobe_left": "lung_left",
    "kidney_cyst_right": "kidney_cyst",
    "kidney_cyst_left": "kidney_cyst",
    "liver_vessels": "hepatic_vessel",
}

# British part of a word → American.
_SPELLINGS = {
    "oesophag": "esophag",
    "tumour": "tumor",
    "coeliac": "celiac",
    "caec": "cec",
    "haem": "hem",
    "oedema": "edema",
    "faec": "fec",
    "grey": "gray",
    "goitre": "goiter",
}
_SIDES = {"right": "right", "rt": "right", "left": "left", "lt": "left"}


def normalise(name: str) -> str:
    """Reduce a name to a key: lower case, American spelling, no punctuation, side at the end.

    "Left_Kidney", "kidney-left", "leftkidney" and "kidney LEFT" share one key.

    Args:
        name: Of a class or a source label.

    Returns:
        The key.
    """
    key = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    key = re.sub(r"\b(left|right)(?=[a-z])", r"\1 ", key)
    for british, american in _SPELLINGS.items():
        key = key.replace(british, american)
    words = key.split()
    sides = [_SIDES[word] for word in words if word in _SIDES]
    return " ".join([word for word in words if word not in _SIDES] + sides)


def _read_aliases() -> dict[str, str]:
    known: dict[str, str] = {}
    for c in CLASSES:
        for alias in (c.name, c.display, c.prompt_name, *c.aliases):
            if known.setdefault(normalise(alias), c.name) != c.name:
                raise ValueError(f"alias {alias!r} stands for two classes")  # a fault of the table
    for label, name in TOTALSEGMENTATOR.items():
        # Lobes and the like are parts: they convert labels, but are no names of the class.
        if label == "small_bowel" or label == name:
            known.setdefault(normalise(label), name)
    return known


_ALIASES = _read_aliases()


def by_name(name: str) -> AnatomicalClass:
    """Return the class of this name or alias.

    Args:
        name: In any spelling.

    Returns:
        The class.

    Raises:
        UsageError: No class goes by that name.
    """
    return CLASSES[NAMES.index(resolve(name))]


def resolve(name: str, allowed: Sequence[str] = NAMES) -> str:
    """Return which of `allowed` (the 32 classes, or those of one model) `name` stands for.

    Case, punctuation, order of words around the side, spelling and aliases do not matter.

    Args:
        name: In any spelling.
        allowed: Names of classes.

    Returns:
        The one of `allowed` that is meant.

    Raises:
        UsageError: None of them; suggests the nearest.
    """
    key = normalise(name)
    keys = {normalise(item): item for item in allowed}
    if key in keys:
        return keys[key]
    for alias, canonical in _ALIASES.items():
        if canonical in allowed:
            keys.setdefault(alias, canonical)
    if key in keys:
        return keys[key]
    if key in _ALIASES:
        raise UsageError(
            f"Class {_ALIASES[key]!r} is not one of this model's {len(allowed)} classes. "
            "See `universal-ct classes`."
        )
    paired = pair_of(key)
    nearest = difflib.get_close_matches(key, keys, n=3, cutoff=0.6)
    suggestions = dict.fromkeys([n for n in paired if n in allowed] or [keys[k] for k in nearest])
    raise UsageError(
        f"Unknown class {name!r}.{suggestion(suggestions)} See `universal-ct classes`."
    )


def pair_of(name: str) -> tuple[str, ...]:
    """Return both sides of a paired organ that is named without one.

    Args:
        name: E.g. "kidney" or "Lungs".

    Returns:
        Names of two classes, or none.
    """
    return PAIRED.get(name.strip().lower().replace(" ", "_").removesuffix("s"), ())


def classes_of(name: str) -> tuple[str, ...]:
    """Return the class of a name or alias, or both sides of a pair that is named without one.

    Args:
        name: In any spelling.

    Returns:
        Names of classes.

    Raises:
        UsageError: No class goes by that name.
    """
    return pair_of(name) or (resolve(name),)


def in_order(classes: Iterable[str]) -> list[str]:
    """Sort names of classes in the paper's order, others after them by name.

    A pair's organ ("kidney") comes before its sides.

    Args:
        classes: Names of the 32 classes, of pairs, and any others.

    Returns:
        The names, sorted.
    """
    rank: dict[str, float] = {name: number for number, name in enumerate(NAMES)}
    rank |= {organ: rank[pair[0]] - 0.5 for organ, pair in PAIRED.items()}
    return sorted(classes, key=lambda name: (rank.get(name, len(NAMES)), name))


def organ_around(parent: str, *texts: str) -> str | None:
    """Find the organ that holds a lesion: a lesion's voxels are its organ's too.

    Args:
        parent: The organ as the lesion's class has it; a pair such as "kidney" stands for one of
            its sides.
        texts: What names the lesion. The side is the one that they tell.

    Returns:
        `parent`, or the side of the pair; None where the texts tell no side, or both.
    """
    if parent not in PAIRED:
        return parent
    words = set(re.split(r"[^a-z]+", " ".join(texts).lower()))
    sides = [name for name in PAIRED[parent] if name.rpartition("_")[2] in words]
    return sides[0] if len(sides) == 1 else None
