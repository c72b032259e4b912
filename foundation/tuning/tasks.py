"""The five TotalSegmentator tasks by which pretrained weights are compared, and few-shot subsets.

organs (17), vertebrae (24), cardiac (18), muscles (21) and ribs (24), of 1.5 mm scans, by the
protocol of SuPreM (Li et al., ICLR 2024). The classes are those of version 1 of
the dataset (zenodo 6802613). What version 2 (zenodo 10047292) changed is in `CHANGED_IN_V2`: its
`cardiac` has 12 classes, the other tasks are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foundation.data.layouts import read_splits
from foundation.data.naming import NewClass
from foundation.errors import UsageError, listed
from foundation.files import replacing

Version = Literal[1, 2]
SIZES = (1, 5, 10, 20, 64, 128, 256, 512, 1024)
_META = "meta.csv"


@dataclass(frozen=True)
class Settings:
    """How the published comparison trains and reads scans.

    Masks are exclusive: a softmax over background and classes. Only the backbone of the pretrained
    model is kept.

    Attributes:
        hu_window: Is scaled to [0, 1]; it starts at -250, not at -175 as in the pretraining.
        spacing_mm: Of the scans, along each axis.
        patch_size: Voxels along each axis.
        learning_rate: Of all weights.
        weight_decay: Of AdamW.
        warm_up_epochs: In which the learning rate rises.
        epochs: One patch of each training scan each.
        validate_every: Epochs between validations.
    """

    hu_window: tuple[float, float] = (-250.0, 250.0)
    spacing_mm: float = 1.5
    patch_size: int = 96
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    warm_up_epochs: int = 20
    epochs: int = 200
    validate_every: int = 10


PUBLISHED = Settings()


@dataclass(frozen=True)
class Task:
    """A group of TotalSegmentator's structures.

    Attributes:
        name: Of the group.
        labels: Version 1's names of their files.
    """

    name: str
    labels: tuple[str, ...]

    def in_version(self, version: Version) -> tuple[str, ...]:
        """Return the names of the files in a version of the dataset.

        Args:
            version: 1 or 2.

        Returns:
            The names; renamed ones once, and without those that the version dropped.

        Raises:
            UsageError: There is no such version.
        """
        if version not in (1, 2):
            raise UsageError(f"TotalSegmentator has versions 1 and 2, not {version!r}.")
        if version == 1:
            return self.labels
        renamed = (CHANGED_IN_V2.get(label, label) for label in self.labels)
        return tuple(dict.fromkeys(label for label in renamed if label))

    def classes(self, version: Version = 1) -> tuple[NewClass, ...]:
        """Return the classes to learn, with prompts by the weights' own text encoder."""
        return tuple(NewClass(label, labels=(label,)) for label in self.in_version(version))


# Version 1's name → version 2's; None: version 2 has no such label.
CHANGED_IN_V2: Mapping[str, str | None] = {
    "heart_myocardium": "heart",  # one label for the whole heart
    "heart_atrium_left": "heart",
    "heart_ventricle_left": "heart",
    "heart_atrium_right": "heart",
    "heart_ventricle_right": "heart",
    "pulmonary_artery": None,  # version 2 has pulmonary_vein, which is another vessel
    "face": None,  # a task of its own there
}


# A name that ends in "_*" stands for its left and its right structure.
_LABELS = {
    "organs": """
        spleen kidney_right kidney_left gallbladder liver stomach aorta inferior_vena_cava
        portal_vein_and_splenic_vein pancreas adrenal_gland_right adrenal_gland_left
        lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right
        lung_lower_lobe_right""",
    "vertebrae": """
        vertebrae_L5 vertebrae_L4 vertebrae_L3 vertebrae_L2 vertebrae_L1
        vertebrae_T12 vertebrae_T11 vertebrae_T10 vertebrae_T9 vertebrae_T8 vertebrae_T7
        vertebrae_T6 vertebrae_T5 vertebrae_T4 vertebrae_T3 vertebrae_T2 vertebrae_T1
        vertebrae_C7 vertebrae_C6 vertebrae_C5 vertebrae_C4 vertebrae_C3 vertebrae_C2
        vertebrae_C1""",
    "cardiac": """
        esophagus trachea heart_myocardium heart_atrium_left heart_ventricle_left
        heart_atrium_right heart_ventricle_right pulmonary_artery brain iliac_artery_* iliac_vena_*
        small_bowel duodenum colon urinary_bladder face""",
    "muscles": """
        humerus_* scapula_* clavicula_* femur_* hip_* sacrum gluteus_maximus_* gluteus_medius_*
        gluteus_minimus_* autochthon_* iliopsoas_*""",
    "ribs": """
        rib_left_1 rib_left_2 rib_left_3 rib_left_4 rib_left_5 rib_left_6 rib_left_7 rib_left_8
        rib_left_9 rib_left_10 rib_left_11 rib_left_12 rib_right_1 rib_right_2 rib_right_3
        rib_right_4 rib_right_5 rib_right_6 rib_right_7 rib_right_8 rib_right_9 rib_right_10
        rib_right_11 rib_right_12""",
}


def _labels(names: str) -> Iterator[str]:
    for name in names.split():
        sides = ("left", "right") if name.endswith("_*") else ("",)
        yield from (name.removesuffix("*") + side for side in sides)


TASKS = {name: Task(name, tuple(_labels(names))) for name, names in _LABELS.items()}


def get_task(name: str) -> Task:
    """Return the task of this name.

    Raises:
        UsageError: There is none.
    """
    if name not in TASKS:
        raise UsageError(f"Unknown task {name!r}. Choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def read_meta(folder: str | Path) -> dict[str, list[str]]:
    """Read the case ids of each split of a TotalSegmentator folder from its meta.csv.

    Args:
        folder: Of the dataset.

    Returns:
        Ids by split: train, val, test.

    Raises:
        UsageError: There is no such table, it names another split, or no case.
    """
    path = Path(folder) / _META
    if not path.is_file():
        raise UsageError(f"{path} does not exist. Give the folder of a TotalSegmentator dataset.")
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for case, split in read_splits(path).items():
        if split not in splits:
            raise UsageError(f"{path}: {case} has the split {split!r}; known are {list(splits)}.")
        splits[split].append(case)
    if not any(splits.values()):
        raise UsageError(f"{path} names no case: it needs the columns image_id and split.")
    return {name: sorted(cases) for name, cases in splits.items()}


# --- few-shot subsets -----------------------------------------------------------------------------


def fewshot_subsets(
    ids: Collection[str], sizes: Sequence[int] = SIZES, seed: int = 0
) -> dict[int, list[str]]:
    """Choose nested subsets of cases: each holds all smaller ones.

    A case's rank depends on its id and the seed alone, so that a subset stays what it is but for
    those that cases added later push out.

    Args:
        ids: Of all cases.
        sizes: Of the subsets; those beyond the number of cases are left out.
        seed: Another one gives other subsets.

    Returns:
        Case ids by size.

    Raises:
        UsageError: A size below 1, or none that there are cases enough for.
    """
    if wrong := [size for size in sizes if size < 1]:
        raise UsageError(f"A subset of {wrong[0]} scans is none; give sizes from 1 on.")
    order = sorted(set(ids), key=lambda id_: hashlib.sha256(f"{seed}:{id_}".encode()).digest())
    possible = sorted({size for size in sizes if size <= len(order)})
    if not possible:
        raise UsageError(
            f"There are {len(order)} scans, fewer than any of the sizes "
            f"{listed([str(size) for size in sizes])}."
        )
    return {size: order[:size] for size in possible}


def write_subsets(path: str | Path, subsets: Mapping[int, Sequence[str]], seed: int) -> Path:
    """Write subsets as JSON, so that others train on the same scans.

    Args:
        path: Of the file.
        subsets: Case ids by size.
        seed: Which chose them.

    Returns:
        The path.
    """
    path = Path(path)
    content = {
        "format_version": 1,
        "seed": seed,
        "subsets": {str(size): list(cases) for size, cases in sorted(subsets.items())},
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
