"""The 32 classes of the paper, the names they go by, and the datasets that annotate them.

The one place that knows class names. The paper numbers its classes from 1; channels count from 0.
The conversion happens here (`_paper`) and nowhere else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from foundation.errors import UsageError
from foundation.settings import suggestion


@dataclass(frozen=True)
class AnatomicalClass:
    """One class of the paper.

    index: channel, 0-based. name: the identifier used everywhere. display: for people.
    prompt_name: the name inside the published weights' prompt, typing errors included.
    parent: the organ a lesion lies in ("kidney" for either kidney; see `parents`).
    snomed: SNOMED CT code, only where it is certain. colour: RGB, 0 to 255.
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
_BY_NAME = {c.name: c for c in CLASSES}

# TotalSegmentator label name (v1, v2, subtasks) → our class. `femur_left` is not among them: the
# whole bone is more than `femur_head_left`. Heart, bones and muscles have no counterpart.
TOTALSEGMENTATOR: dict[str, str] = {
    **{
        name: name
        for name in (
            *("spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver"),
            *("stomach", "aorta", "inferior_vena_cava", "portal_vein_and_splenic_vein"),
            *("pancreas", "adrenal_gland_right", "adrenal_gland_left", "duodenum", "colon"),
            *("urinary_bladder", "prostate", "rectum", "celiac_trunk"),
        )
    },
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

_SPELLINGS = (  # British → American, as parts of words
    *(("oesophag", "esophag"), ("tumour", "tumor"), ("coeliac", "celiac"), ("caec", "cec")),
    *(
        ("haem", "hem"),
        ("oedema", "edema"),
        ("faec", "fec"),
        ("grey", "gray"),
        ("goitre", "goiter"),
    ),
)
_SIDES = {"right": "right", "rt": "right", "left": "left", "lt": "left"}


def normalise(name: str) -> str:
    """Reduce a name to a key: lower case, American spelling, no punctuation, side at the end.

    "Left_Kidney", "kidney-left" and "kidney LEFT" share one key.
    """
    key = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    for british, american in _SPELLINGS:
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

    Raises:
        UsageError: no class goes by that name.
    """
    return _BY_NAME[resolve(name)]


def resolve(name: str, allowed: Sequence[str] = NAMES) -> str:
    """Return which of `allowed` (the 32 classes, or those of one model) `name` stands for.

    Case, punctuation, order of words around the side, spelling and aliases do not matter.

    Raises:
        UsageError: none of them; suggests the nearest.
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
    paired = PAIRED.get(re.sub(r"s$", "", key).replace(" ", "_"), ())
    nearest = difflib.get_close_matches(key, keys, n=3, cutoff=0.6)
    suggestions = dict.fromkeys([n for n in paired if n in allowed] or [keys[k] for k in nearest])
    raise UsageError(
        f"Unknown class {name!r}.{suggestion(suggestions)} See `universal-ct classes`."
    )


@dataclass(frozen=True)
class Dataset:
    """One dataset of the paper: how its label values become our classes.

    label_map: source value (or file name, where each structure is a file) → class names. Two names
    are a merged pair whose sides must be told apart; `split_left_right` lists those values.
    annotated: the classes this dataset's annotators labelled; the loss masks all others.
    licence: SPDX id, only where it is certain; check the source before use.
    """

    id: str
    name: str
    label_map: Mapping[int | str, tuple[str, ...]]
    annotated: tuple[str, ...]
    url: str | None = None
    licence: str | None = None
    note: str = ""
    split_left_right: tuple[int | str, ...] = field(init=False)

    def __post_init__(self) -> None:
        merged = tuple(v for v, names in self.label_map.items() if names in PAIRED.values())
        object.__setattr__(self, "split_left_right", merged)

    def positive_classes(self, value: int | str) -> tuple[str, ...]:
        """Return all classes a source value is positive for: a lesion's voxels are its organ's too.

        Organs that this dataset does not annotate are left out, as nothing is known of them. A pair
        that must be split stands for one of its sides, unknown until then.

        Raises:
            UsageError: the dataset has no such label value.
        """
        if value not in self.label_map:
            raise UsageError(
                f"{self.name} has no label {value!r}; its labels are {list(self.label_map)}."
            )
        names = self.label_map[value]
        organs = [p for n in names for p in _BY_NAME[n].parents if p in self.annotated]
        return tuple(dict.fromkeys((*names, *organs)))


def _paper(numbers: str) -> tuple[str, ...]:
    """Turn the paper's numbers ("2/3" is a merged pair) into class names."""
    return tuple(NAMES[int(number) - 1] for number in re.split(r"[/,]", numbers))


def _identity(numbers: str) -> dict[int | str, tuple[str, ...]]:
    return {int(number): _paper(number) for number in numbers.split(",")}


def _ordered(numbers: str) -> dict[int | str, tuple[str, ...]]:
    """Source values 1, 2, 3 … in the order of the paper's numbers."""
    return {value: _paper(number) for value, number in enumerate(numbers.split(","), start=1)}


def _dataset(
    id: str,
    name: str,
    label_map: dict[int | str, tuple[str, ...]],
    annotated: str = "",
    url: str | None = None,
    licence: str | None = None,
    note: str = "",
) -> Dataset:
    found = {n for names in label_map.values() for n in names}
    wanted = set(_paper(annotated)) if annotated else found
    return Dataset(id, name, label_map, tuple(n for n in NAMES if n in wanted), url, licence, note)


_MSD = ("http://medicaldecathlon.com", "CC-BY-SA-4.0")
_MULTI_ORGAN = "https://zenodo.org/records/1169361"
_EIGHT_ORGANS = "1,3,4,5,6,7,11,14"

_NOT_IN_V1 = (
    *("prostate", "rectum", "celiac_trunk", "liver_vessels"),
    *("kidney_cyst_right", "kidney_cyst_left"),
)

_NOT_IN_V2 = ("rectum", "celiac_trunk", "liver_vessels")
_TCIA = "https://www.cancerimagingarchive.net/collection/"

_ALL_DATASETS = (
    _dataset("01", "BTCV", _identity("1,2,3,4,5,6,7,8,9,10,11,12,13,14"), url=_MULTI_ORGAN),
    _dataset(
        "01_2",
        "BTCV, cases 60 and above",
        _identity("1,2,3,4,5,6,7,8,9,10,11,12,13,14"),
        _EIGHT_ORGANS,
        _MULTI_ORGAN,
        note="These cases annotate 8 of the 14 organs; the others are unknown, not absent.",
    ),
    _dataset(
        "02",
        "Pancreas-CT",
        _identity(_EIGHT_ORGANS),
        url=_MULTI_ORGAN,
        note="The images are under CC-BY-3.0; labels outside the labellers' crop may be missing.",
    ),
    _dataset("03", "CHAOS", _ordered("6"), url="https://chaos.grand-challenge.org"),
    _dataset(
        "04", "LiTS", _ordered("6,27"), url="https://competitions.codalab.org/competitions/17094"
    ),
    _dataset(
        "05",
        "KiTS",
        _ordered("2/3,26,32"),
        url="https://kits-challenge.org",
        licence="CC-BY-NC-SA-4.0",
    ),
    _dataset(
        "06",
        "3D-IRCADb",
        {
            name: _paper(number)
            for name, number in {
                "spleen": "1",
                "rightkidney": "2",
                "leftkidney": "3",
                "gallbladder": "4",
                "liver": "6",
                "stomach": "7",
                "pancreas": "11",
                "rightlung": "16",
                "leftlung": "17",
            }.items()
        },
        url="https://www.ircad.fr/research/data-sets/liver-segmentation-3d-ircadb-01/",
        note="External test set; one mask folder per structure.",
    ),
    _dataset(
        "07",
        "WORD",
        _ordered("6,1,3,2,7,4,5,11,14,18,19,12/13,20,21,23,24"),
        url="https://github.com/HiLab-git/WORD",
    ),
    _dataset(
        "08",
        "AbdomenCT-1K",
        _ordered("6,2/3,1,11"),
        url="https://github.com/JunMa11/AbdomenCT-1K",
    ),
    _dataset(
        "09",
        "AMOS22",
        _ordered("1,2,3,4,5,6,7,8,9,11,12,13,14,21,22"),
        url="https://amos22.grand-challenge.org",
        note="Its label 15 is the prostate or the uterus.",
    ),
    _dataset("10_03", "MSD liver", _ordered("6,27"), "", *_MSD),
    _dataset("10_06", "MSD lung", _ordered("30"), "", *_MSD),
    _dataset("10_07", "MSD pancreas", _ordered("11,28"), "", *_MSD),
    _dataset("10_08", "MSD hepatic vessel", _ordered("15,29"), "", *_MSD),
    _dataset("10_09", "MSD spleen", _ordered("1"), "", *_MSD),
    _dataset("10_10", "MSD colon", _ordered("31"), "", *_MSD),
    _dataset(
        "12",
        "CT-ORG",
        _ordered("6,21,16/17,2/3"),
        url=_TCIA + "ct-org/",
        licence="CC-BY-3.0",
        note="The README of the published code numbers it 11. 5 bone and 6 brain are unused.",
    ),
    _dataset(
        "13",
        "AbdomenCT-12organ",
        _ordered("6,2/3,1,11,8,9,7,4,5,12,13,25"),
        url="https://github.com/JunMa11/AbdomenCT-1K",
        note="The README of the published code numbers it 12.",
    ),
    _dataset(
        "15",
        "TotalSegmentator",
        {k: (name,) for k, name in TOTALSEGMENTATOR.items() if k not in _NOT_IN_V1},
        "",
        "https://zenodo.org/records/6802613",
        "CC-BY-4.0",
        "External test set (v1); one file per structure. Its colon holds the rectum.",
    ),
    _dataset(
        "15_v2",
        "TotalSegmentator v2",
        {k: (name,) for k, name in TOTALSEGMENTATOR.items() if k not in _NOT_IN_V2},
        "",
        "https://zenodo.org/records/10047292",
        "CC-BY-4.0",
        "One file per structure. Its colon holds the rectum.",
    ),
)
DATASETS: dict[str, Dataset] = {dataset.id: dataset for dataset in _ALL_DATASETS}
