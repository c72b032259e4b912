"""A generated world of CT datasets with known truth, each labelled in part, for the benchmarks.

    python benchmarks/world.py FOLDER [--size mini|smoke] [--seed 1]

FOLDER receives a folder with scans and label maps (NIfTI) and a dataset YAML for each of
`DATASETS`, and world.json with the seed and the SHA-256 of each dataset. The datasets are read as
any user's are, so a benchmark on them takes the way of one on real data. The same seed gives the
same world.

The bodies are generated phantoms and no two scans share one: anatomies of training, validation and
test are disjoint. What is measured here compares arms of an experiment with each other. It says
nothing about patients.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from foundation import (
    CLASSES,
    TOTALSEGMENTATOR,
    DatasetWarning,
    UsageError,
    get_dataset,
    prepare,
    replacing_folder,
)
from foundation.data import Case, Dataset, Store
from foundation.evaluation import path_sha256
from foundation.synthesis import (
    FINE_MM,
    TISSUES,
    Phantom,
    View,
    draw_view,
    generate,
    load_anatomies,
    render_ct,
)

WORLD = "world.json"
RENDERED = "rendered"
UNKNOWN = 255  # label value of voxels that a rendered scan does not cover
FEWEST_ORGANS = 8  # that a label map must annotate to be rendered as a scan
EXTENT_MM = 384.0  # of a rendered scan along each axis
FORMAT_VERSION = 1
LARGE_ML = 40.0
Role = Literal["train", "validation", "test", "external"]
Size = Literal["mini", "smoke"]

# Lesions of paired organs; the organ's side is told, since the lesion is a part of that organ.
SIDED = tuple(
    (lesion, f"{organ}_{side}")
    for lesion, organ in (
        ("kidney_tumor", "kidney"),
        ("kidney_cyst", "kidney"),
        ("lung_tumor", "lung"),
    )
    for side in ("right", "left")
)
ALL_CLASSES = tuple(each.name for each in CLASSES)
# Structures that the taxonomy does not have, to be taught as new classes.
NEW_STRUCTURES = (
    "sacrum",
    "hip_left",
    "hip_right",
    "heart",
    "vertebrae",
    "iliopsoas_left",
    "iliopsoas_right",
    "autochthon_left",
    "autochthon_right",
    "gluteus_left",
    "gluteus_right",
    "spinal_cord",
)


@dataclass(frozen=True)
class Part:
    """One dataset of the world.

    Attributes:
        name: Of the dataset and its folder.
        role: What it may be used for.
        like: The real datasets whose labelling it has.
        classes: What its annotators labelled.
        lesion: Three of four scans show this lesion.
    """

    name: str
    role: Role
    like: str
    classes: tuple[str, ...]
    lesion: str | None = None


def _lesions(name: str, like: str, organs: Sequence[str], *lesions: str) -> Part:
    return Part(name, "train", like, (*organs, *lesions), lesions[0])


_KIDNEYS = ("kidney_right", "kidney_left")
_ADRENALS = ("adrenal_gland_right", "adrenal_gland_left")
_UPPER = ("spleen", *_KIDNEYS, "gallbladder", "esophagus", "liver", "stomach", "pancreas")
_VESSELS = ("aorta", "inferior_vena_cava")
_BOWEL = ("duodenum", "colon", "intestine", "rectum", "urinary_bladder")
_FEMURS = ("femur_head_left", "femur_head_right")
# As in the paper, a few datasets label many organs, and the lesions' datasets little else.
DATASETS = (
    Part(
        "abdomen", "train", "BTCV", (*_UPPER, *_VESSELS, "portal_vein_and_splenic_vein", *_ADRENALS)
    ),
    Part("trunk", "train", "WORD", (*_UPPER, *_BOWEL, *_ADRENALS, *_FEMURS)),
    Part(
        "pelvis",
        "train",
        "AMOS",
        (*_UPPER, *_VESSELS, *_ADRENALS, "duodenum", "urinary_bladder", "prostate"),
    ),
    Part("twelve", "train", "AbdomenCT-12organ", (*_UPPER, *_VESSELS, *_ADRENALS, "celiac_trunk")),
    _lesions("liver", "LiTS, MSD liver", ["liver"], "liver_tumor"),
    _lesions("kidney", "KiTS", _KIDNEYS, "kidney_tumor", "kidney_cyst"),
    _lesions("lung", "CT-ORG, MSD lung", ["lung_right", "lung_left"], "lung_tumor"),
    _lesions("pancreas", "MSD pancreas", ["pancreas"], "pancreas_tumor"),
    _lesions("vessels", "MSD hepatic vessel", ["hepatic_vessel"], "hepatic_vessel_tumor"),
    _lesions("colon", "MSD colon", [], "colon_tumor"),
    Part("validation", "validation", "", ALL_CLASSES),
    Part("test", "test", "", ALL_CLASSES),
    Part("external", "external", "3D-IRCADb, TotalSegmentator", ALL_CLASSES),
    Part("structures", "train", "TotalSegmentator", NEW_STRUCTURES),
    Part("structures_test", "test", "TotalSegmentator", (*ALL_CLASSES, *NEW_STRUCTURES)),
)


@dataclass(frozen=True)
class Scale:
    """How large a world is.

    Attributes:
        spacing_mm: Of the voxels.
        counts: Scans of a dataset, by its role.
    """

    spacing_mm: float
    counts: dict[Role, int]

    def count(self, part: Part) -> int:
        """Return how many scans a dataset has."""
        return self.counts[part.role]


SCALES: dict[Size, Scale] = {
    "mini": Scale(8.0, {"train": 12, "validation": 6, "test": 24, "external": 16}),
    "smoke": Scale(10.0, {"train": 2, "validation": 1, "test": 3, "external": 2}),
}


@dataclass(frozen=True)
class World:
    """A world on disk.

    Attributes:
        folder: Of the world.
        seed: From which it was generated.
        size: Key of `SCALES`.
        sha256: Dataset → hash of its folder.
        volumes_ml: Class → its mean volume over the scans of "test" that show it.
    """

    folder: Path
    seed: int
    size: Size
    sha256: dict[str, str]
    volumes_ml: dict[str, float]

    @property
    def spacing_mm(self) -> float:
        """Of the scans."""
        return SCALES[self.size].spacing_mm

    def dataset(self, name: str) -> tuple[str, str]:
        """Return a dataset as `prepare` takes it: its YAML file and its folder.

        Raises:
            UsageError: The world has no such dataset.
        """
        if name not in self.sha256:
            raise UsageError(f"The world has no dataset {name!r}; it has {', '.join(self.sha256)}.")
        return str(self.folder / f"{name}.yaml"), str(self.folder / name)

    @property
    def large_organs(self) -> list[str]:
        """Organs of at least `LARGE_ML`: at this spacing smaller ones are a few voxels.

        Comparisons are made by them, since a small network learns them in a short training.
        """
        organs = [each.name for each in CLASSES if each.kind == "organ"]
        return [name for name in organs if self.volumes_ml.get(name, 0.0) >= LARGE_ML]

    def datasets(self, role: Role) -> list[str]:
        """Return the names of the datasets with a role; without those of new structures."""
        known = set(ALL_CLASSES)
        return [p.name for p in DATASETS if p.role == role and known.issuperset(p.classes)]


def build_world(
    folder: str | Path, size: Size = "mini", seed: int = 1, progress: bool = True
) -> World:
    """Generate a world, or open the one that lies there.

    Args:
        folder: Appears whole. An earlier world in it is used again if it is the same.
        size: "mini" or "smoke".
        seed: Of all bodies and renderings.
        progress: Whether a bar is shown.

    Returns:
        The world.

    Raises:
        UsageError: The folder holds something else, or another world.
    """
    folder = Path(folder).resolve()
    if folder.exists():
        return _open(folder, size, seed)
    scale = SCALES[size]
    total = sum(scale.count(part) for part in DATASETS)
    bar = tqdm(total=total, desc="world", unit="scan", disable=None if progress else True)
    with replacing_folder(folder) as temporary, bar:
        bodies = _bodies(scale.spacing_mm, seed)
        hashes: dict[str, str] = {}
        volumes: dict[str, list[float]] = {}
        for part in DATASETS:
            for number in range(scale.count(part)):
                ill = part.lesion if number % 4 != 3 else None
                body = next(b for b in bodies if ill is None or b.mask(ill).any())
                labels = _write_scan(temporary / part.name, f"{part.name}_{number:03d}", body, part)
                if part.name == "test":
                    for name, voxels in _sizes(labels, part).items():
                        volumes.setdefault(name, []).append(voxels * scale.spacing_mm**3 / 1000)
                bar.update()
            (temporary / f"{part.name}.yaml").write_text(_description(part), encoding="utf-8")
            hashes[part.name] = path_sha256(temporary / part.name)
        means = {name: round(float(np.mean(found)), 2) for name, found in volumes.items()}
        world = World(folder, seed, size, hashes, means)
        content = {"format_version": FORMAT_VERSION, **asdict(world)}
        del content["folder"]
        (temporary / WORLD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return world


def _open(folder: Path, size: Size, seed: int) -> World:
    if not (folder / WORLD).is_file():
        raise UsageError(f"{folder} exists and is no world; give another folder.")
    content = json.loads((folder / WORLD).read_text(encoding="utf-8"))
    wanted = {"format_version": FORMAT_VERSION, "size": size, "seed": seed}
    if found := [f"{k} {content.get(k)!r}" for k, v in wanted.items() if content.get(k) != v]:
        raise UsageError(f"{folder} holds another world ({', '.join(found)}); give another folder.")
    return World(folder, seed, size, content["sha256"], content["volumes_ml"])


# --- bodies of another origin ---------------------------------------------------------------------


def render_external(
    folder: str | Path, data: str | Path, spacing_mm: float, count: int = 16, seed: int = 1
) -> tuple[str, str]:
    """Render label maps of open CTs anew: a test set of another origin than the phantoms.

    The anatomies are those of `universal-ct datasets` open-data that come without a scan: few
    people, each deformed and rendered several times. Scans of one person are not independent.

    Args:
        folder: Receives rendered/ and rendered.yaml, whole. What lies there is used again if it is
            the same.
        data: The folder of open-data.
        spacing_mm: Of the scans.
        count: Of the scans; the anatomies take turns.
        seed: Of all chance.

    Returns:
        The YAML file and the folder of the scans, as `prepare` takes them.

    Raises:
        UsageError: There is no such label map, or `folder` holds other scans.
    """
    folder = Path(folder).resolve()
    dataset = get_dataset("open-data")
    maps = replace(dataset, rules=(*dataset.rules, _label_maps_only))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)  # of cases that are left out on purpose
        sources = {c.id: [path_sha256(p) for p in c.labels] for c in maps.find(data)}
    wanted = {"seed": seed, "spacing_mm": spacing_mm, "count": count, "sources": sources}
    found = str(folder / f"{RENDERED}.yaml"), str(folder / RENDERED)
    if folder.exists():
        record = folder / f"{RENDERED}.json"
        if not record.is_file() or json.loads(record.read_text(encoding="utf-8")) != wanted:
            raise UsageError(f"{folder} holds other scans; give another folder, or delete it.")
        return found
    with replacing_folder(folder) as temporary:
        _render_maps(temporary, maps, Path(data), wanted)
        text = json.dumps(wanted, indent=1) + "\n"
        (temporary / f"{RENDERED}.json").write_text(text, encoding="utf-8")
    return found


def _label_maps_only(case: Case, _: Dataset) -> Case | str:
    whole = len(case.annotated) >= FEWEST_ORGANS  # an organ in an empty body is no CT
    fits = case.image is None and case.weight > 0 and whole
    return case if fits else "it is not the label map of a trunk."


def _render_maps(folder: Path, maps: Dataset, data: Path, wanted: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as store, warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)
        prepare(
            [(maps, data)],
            store,
            spacing_mm=FINE_MM,
            femoral_heads=True,
            workers=1,
            progress=False,
        )
        anatomies = load_anatomies(Store(store))
    spacing_mm = wanted["spacing_mm"]
    values: dict[frozenset[str], int] = {}
    annotated: dict[str, tuple[str, ...]] = {}
    for number in range(wanted["count"]):
        anatomy = anatomies[number % len(anatomies)]
        case = f"{anatomy.name.rpartition('/')[2]}_{number // len(anatomies):02d}"
        rng = np.random.default_rng([wanted["seed"], number])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        view = draw_view(anatomy, round(EXTENT_MM / spacing_mm), spacing_mm, rng, generator)
        labels = _joint_values(view, anatomy.unknown, values)
        hu = np.rint(view.hu.numpy()).astype(np.int16)
        affine = np.diag([spacing_mm] * 3 + [1.0])
        _write_pair(folder / RENDERED, case, hu, labels, affine, b"rendered label map, no scan")
        annotated[case] = anatomy.annotated
    known = {name for classes in values for name in classes}
    cases = {
        case: {"annotated": [n for n in names if n in known]} for case, names in annotated.items()
    }
    content = {
        "name": RENDERED,
        "note": "Label maps of open-data, deformed and rendered anew. Labels are machine-made.",
        "images": "images/{id}.nii.gz",
        "labels": "labels/{id}.nii.gz",
        "classes": {value: sorted(classes) for classes, value in values.items()},
        "unknown": [UNKNOWN],
        "cases": cases,
    }
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
    (folder / f"{RENDERED}.yaml").write_text(text, encoding="utf-8")


def _joint_values(
    view: View, unknown: Sequence[int], values: dict[frozenset[str], int]
) -> NDArray[np.uint8]:
    """Labels with one value for each set of classes, which is added to `values` if it is new."""
    labels = view.labels.numpy()
    joint = np.zeros(labels.shape, np.uint8)
    for value in np.unique(labels).tolist():
        if classes := frozenset(view.sets.get(value, ())):
            joint[labels == value] = values.setdefault(classes, len(values) + 1)
    joint[np.isin(labels, list(unknown)) | ~view.covered.numpy()] = UNKNOWN
    return joint


# --- writing --------------------------------------------------------------------------------------


def _bodies(spacing_mm: float, seed: int) -> Iterator[Phantom]:
    """Generate body after body; none is ever used twice."""
    number = 0
    while True:
        yield generate(seed * 1_000_000 + number, spacing_mm)
        number += 1


def _sizes(labels: NDArray[np.uint8], part: Part) -> dict[str, int]:
    """Count the voxels of each class that is there."""
    found: dict[str, int] = {}
    for value, names in _meanings().items():
        if count := int((labels == value).sum()):
            for name in set(names) & set(part.classes):
                found[name] = found.get(name, 0) + count
    return found


def _write_scan(folder: Path, case: str, body: Phantom, part: Part) -> NDArray[np.uint8]:
    rng = np.random.default_rng(body.seed)
    hu = np.rint(render_ct(body.label_map, body.names, body.spacing_mm[0], rng)).astype(np.int16)
    labels = _labels(body, part)
    _write_pair(folder, case, hu, labels, body.affine, b"generated phantom, no patient")
    return labels


def _write_pair(
    folder: Path,
    case: str,
    hu: NDArray[np.int16],
    labels: NDArray[np.uint8],
    affine: NDArray[np.float64],
    note: bytes,
) -> None:
    for kind, values in (("images", hu), ("labels", labels)):
        path = folder / kind / f"{case}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(values, affine)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = note
        nib.save(image, path)


def _meanings() -> dict[int, tuple[str, ...]]:
    """What each value of the label maps is: a structure, and the organ that it is a part of."""
    parts = {each.name: each.parent for each in CLASSES} | {"hepatic_vessel": "liver"}
    found = {}
    for value, tissue in enumerate(TISSUES):
        name = TOTALSEGMENTATOR.get(tissue, tissue)
        if tissue not in {lesion for lesion, _ in SIDED}:
            found[value] = tuple(each for each in (name, parts.get(name)) if each)
    return found | dict(enumerate(SIDED, start=len(TISSUES)))


def _labels(body: Phantom, part: Part) -> NDArray[np.uint8]:
    """The phantom's label map as the annotators left it: 0 where they labelled nothing."""
    labels = body.label_map.copy()
    x_mm = body.affine[0, 3] + body.affine[0, 0] * np.arange(labels.shape[0])
    right = np.broadcast_to((x_mm > 0)[:, None, None], labels.shape)
    for value, (lesion, organ) in enumerate(SIDED, start=len(TISSUES)):
        labels[body.mask(lesion) & (right == organ.endswith("_right"))] = value
    kept = [v for v, names in _meanings().items() if not set(names).isdisjoint(part.classes)]
    return np.where(np.isin(labels, kept), labels, 0).astype(np.uint8)


def _description(part: Part) -> str:
    """The dataset's YAML: what its values are, and which classes its annotators labelled."""
    classes: dict[int, list[Any]] = {}
    for value, names in _meanings().items():
        if labelled := [name for name in names if name in part.classes]:
            classes[value] = [{"name": n} if n in NEW_STRUCTURES else n for n in labelled]
    content = {
        "name": part.name,
        "licence": "CC0-1.0",
        "note": f"Generated phantoms. Labelled as {part.like or 'no real dataset: every class'}.",
        "images": "images/{id}.nii.gz",
        "labels": "labels/{id}.nii.gz",
        "classes": classes,
        "annotated": list(part.classes),
    }
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None)


def main() -> None:
    """Generate a world."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=list(SCALES), default="mini")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    world = build_world(given.folder, given.size, given.seed)
    print(f"{world.folder}: {len(world.sha256)} datasets")


if __name__ == "__main__":
    main()
