"""The datasets of the paper: one row each, saying how its cases are found and read."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

from foundation.data.cases import Case
from foundation.data.custom import OPEN_DATA, read_nnunet, read_yaml
from foundation.data.dataset import Adapter
from foundation.data.layouts import DatasetJson, Patterns
from foundation.data.reading import structures_of
from foundation.errors import UsageError
from foundation.taxonomy import DATASETS, Dataset


def _btcv(case: Case, _: Dataset) -> Case:
    """From case 60 on, only 8 of the 14 organs are annotated."""
    few = DATASETS["01_2"].annotated
    return replace(case, annotated=few) if int(case.id) >= 60 else case


def _amos(case: Case, _: Dataset) -> Case | str:
    """Up to 500 the scans are CT, above MR."""
    is_ct = int(case.id.rpartition("_")[2]) <= 500
    return case if is_ct else "an MR scan (ids above 500 are), not CT."


def _with_mask(case: Case, dataset: Dataset) -> Case:
    """A class is annotated where all of its structures have a mask; else it is unknown."""
    there = structures_of(case.labels)
    lost = {n for key, ns in dataset.label_map.items() if key not in there for n in ns}
    return replace(
        case,
        labels=tuple(p for p in case.labels if structures_of([p]) <= dataset.label_map.keys()),
        annotated=tuple(name for name in case.annotated if name not in lost),
    )


# --- the table -----------------------------------------------------------------------------------


def _nifti(images: str, labels: str) -> Patterns:
    return Patterns(tuple(images.split()), tuple(labels.split()))


def _msd(number: str, used: int) -> Adapter:
    return Adapter(
        DATASETS[f"10_{number}"],
        DatasetJson(f"Task{number}"),
        used_cases=used,
        obtain=f"Task{number} of the Medical Segmentation Decathlon",
    )


_TOTALSEGMENTATOR = Patterns(
    ("**/{id}/ct.nii.gz",), ("**/{id}/segmentations/*.nii.gz",), many=True, meta="meta.csv"
)

_TABLE = (
    Adapter(
        DATASETS["01"],
        _nifti("**/img{number}.nii.gz", "**/label{number}.nii.gz"),
        settle=_btcv,
        paper_cases=50,
        used_cases=47,
        obtain="images from Synapse (syn3193805), labels from the URL",
    ),
    Adapter(
        DATASETS["02"],
        _nifti("**/PANCREAS_{number}/**/", "**/label{number}.nii.gz"),
        paper_cases=82,
        used_cases=42,
        obtain="images from TCIA (cancerimagingarchive.net/collection/pancreas-ct), labels from "
        "the URL",
    ),
    Adapter(
        DATASETS["03"],
        Patterns(("**/{number}/DICOM_anon/",), ("**/{number}/Ground/*.png",), many=True),
        labels_as="slices",
        paper_cases=40,
        used_cases=20,
        obtain="CHAOS_Train_Sets.zip from zenodo.org/records/3431873; only its CT folder is used",
    ),
    Adapter(
        DATASETS["04"],
        _nifti("**/volume-{number}.nii", "**/segmentation-{number}.nii"),
        paper_cases=201,
        used_cases=131,
    ),
    Adapter(
        DATASETS["05"],
        _nifti("**/{id}/imaging.nii.gz", "**/{id}/segmentation.nii.gz"),
        paper_cases=300,
        used_cases=300,
    ),
    Adapter(
        DATASETS["06"],
        Patterns(
            ("**/3Dircadb1.{number}/PATIENT_DICOM/**/",),
            ("**/3Dircadb1.{number}/MASKS_DICOM/**/*",),
            many=True,
        ),
        labels_as="dicom masks",
        settle=_with_mask,
        obtain="unpack PATIENT_DICOM.zip and MASKS_DICOM.zip of each patient",
    ),
    Adapter(
        DATASETS["07"],
        _nifti(
            "**/imagesTr/{id}.nii.gz **/imagesVal/{id}.nii.gz",
            "**/labelsTr/{id}.nii.gz **/labelsVal/{id}.nii.gz",
        ),
        paper_cases=150,
        used_cases=120,
    ),
    Adapter(
        DATASETS["08"],
        _nifti("**/Case_{number}_0000.nii.gz", "**/Case_{number}.nii.gz"),
        paper_cases=1000,
        used_cases=1000,
    ),
    Adapter(
        DATASETS["09"],
        DatasetJson(lists=("training", "validation")),
        settle=_amos,
        paper_cases=500,
        used_cases=200,
        obtain="zenodo.org/records/7262581; MR scans are passed over",
    ),
    _msd("03", 131),
    _msd("06", 63),
    _msd("07", 281),
    _msd("08", 303),
    _msd("09", 41),
    _msd("10", 126),
    Adapter(
        DATASETS["12"],
        _nifti("**/volume-{number}.nii.gz", "**/labels-{number}.nii.gz"),
        unused={"5": "bones", "6": "brain"},
        paper_cases=140,
        used_cases=140,
    ),
    Adapter(
        DATASETS["13"],
        _nifti("**/Organ12_{number}_0000.nii.gz", "**/Organ12_{number}.nii.gz"),
        used_cases=50,
    ),
    Adapter(
        DATASETS["15"],
        _TOTALSEGMENTATOR,
        labels_as="masks",
        settle=_with_mask,
        all_structures=True,
        paper_cases=1024,
    ),
    Adapter(
        DATASETS["15_v2"],
        _TOTALSEGMENTATOR,
        labels_as="masks",
        settle=_with_mask,
        all_structures=True,
    ),
)
ADAPTERS: dict[str, Adapter] = {adapter.dataset.id: adapter for adapter in _TABLE}


def get_adapter(name: str | Path) -> Adapter:
    """The adapter of a dataset of the paper by id or name ("04", "LiTS"), or of one's own.

    One's own is a YAML file, or a folder with a `dataset.json` in nnU-Net's format. "open-data"
    is the description that comes with the package.

    Raises:
        UsageError: there is none of this name, or its description is wrong.
    """
    text = str(name)
    by_either = {
        key.lower(): adapter
        for adapter in _TABLE
        for key in (adapter.dataset.id, adapter.dataset.name)
    }
    if text.lower() in by_either:
        return by_either[text.lower()]
    path = Path(OPEN_DATA if text == "open-data" else name)
    if path.suffix.lower() in (".yaml", ".yml"):
        return read_yaml(path)
    if (path / "dataset.json").is_file():
        return read_nnunet(path / "dataset.json")
    near = difflib.get_close_matches(text.lower(), by_either, n=2, cutoff=0.5)
    known = [by_either[key].dataset.name for key in near]
    hint = f" Did you mean {' or '.join(map(repr, known))}?" if known else ""
    raise UsageError(
        f"Unknown dataset {text!r}.{hint} Give an id or a name of `universal-ct datasets`, a YAML "
        "file that describes your own, or a folder with nnU-Net's dataset.json."
    )
