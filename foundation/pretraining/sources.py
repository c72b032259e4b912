"""Where training patches come from: label maps rendered anew each time, labelled CTs, phantoms.

Each source says which classes it annotates. A label value that means nothing to the taxonomy is
background for the annotated classes; a class that is not annotated is masked out of the loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from foundation import phantom
from foundation.errors import UsageError
from foundation.taxonomy import CLASSES, TOTALSEGMENTATOR

FINE_MM = 2.0  # label maps are kept and rendered at this spacing
COARSE_MM = 4.0  # spacing of the skin map
SKIN_MARGIN = 16  # voxels by which the skin map is larger than its label map, on every side
INDEX = {spec.name: spec.index for spec in CLASSES}
# Grown into the organ by the sampler, so a rendered anatomy annotates them all.
LESION_HOSTS = {
    "kidney_tumor": ("kidney_left", "kidney_right"),
    "kidney_cyst": ("kidney_left", "kidney_right"),
    "liver_tumor": ("liver",),
    "pancreas_tumor": ("pancreas",),
    "hepatic_vessel_tumor": ("hepatic_vessel",),
    "lung_tumor": ("lung_left", "lung_right"),
    "colon_tumor": ("colon",),
}
_TOTALSEGMENTATOR_V2 = (
    "spleen kidney_right kidney_left gallbladder esophagus liver stomach aorta inferior_vena_cava "
    "portal_vein_and_splenic_vein pancreas adrenal_gland_right adrenal_gland_left duodenum "
    "lung_right lung_left colon intestine urinary_bladder prostate"
).split()
_VISIBLE_HUMAN = (
    "spleen kidney_right kidney_left liver pancreas duodenum colon intestine rectum urinary_bladder"
).split()
_LESIONS = [name for name in LESION_HOSTS if name != "hepatic_vessel_tumor"]
_LIVER_VESSELS = "liver inferior_vena_cava portal_vein_and_splenic_vein hepatic_vessel".split()
_OWN_NAMES = {"hepatic_veins": "hepatic_vessel", "portal_vein_branches": "hepatic_vessel"}


@dataclass
class Anatomy:
    """A label map (X, Y, Z; RAS) at FINE_MM isotropic, and what is known about it.

    names: label value → tissue name. annotated: channels that this source labels. weight: how
    often it is drawn, relative to the others.
    skin_mm: signed distance at COARSE_MM, larger by SKIN_MARGIN, positive outside: to the skin where `has_skin`, else to
    the hull of the labelled tissue, around which the sampler lays a wall and fat. None: the label
    map holds every tissue.
    ct: HU on the same grid where the anatomy comes with a scan; the label map is then not rendered.
    """

    name: str
    label_map: np.ndarray
    names: Mapping[int, str]
    annotated: tuple[int, ...]
    weight: float
    skin_mm: np.ndarray | None = None
    has_skin: bool = False
    ct: np.ndarray | None = None
    membership: np.ndarray = field(init=False)
    centres: dict[int, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.membership = membership_table(self.names)
        annotated = np.zeros(len(CLASSES), dtype=bool)
        annotated[list(self.annotated)] = True
        self.membership &= annotated
        self.centres = dict(_voxels_by_class(self.label_map, self.membership))


def membership_table(names: Mapping[int, str]) -> np.ndarray:
    """Which channels a voxel of each label value belongs to, bool (256, 32).

    A cyst's voxels belong to the kidney of its side as well, a hepatic vessel's to the liver.
    """
    table = np.zeros((256, len(CLASSES)), dtype=bool)
    for value, label in names.items():
        name = TOTALSEGMENTATOR.get(label, _OWN_NAMES.get(label, label))
        if name in INDEX:
            table[value, INDEX[name]] = True
        if label.startswith("kidney_cyst_"):
            table[value, INDEX[label.replace("_cyst", "")]] = True
        if name == "hepatic_vessel" and label in _OWN_NAMES:
            table[value, INDEX["liver"]] = True
    return table


def _voxels_by_class(
    label_map: np.ndarray, membership: np.ndarray, most: int = 2000
) -> Iterator[tuple[int, np.ndarray]]:
    """Up to `most` voxel positions (N, 3) of each class present, to centre patches on."""
    picker = np.random.default_rng(0)
    for channel in range(membership.shape[1]):
        values = np.flatnonzero(membership[:, channel])
        found = np.flatnonzero(np.isin(label_map, values)) if len(values) else np.empty(0, int)
        if len(found):
            found = picker.choice(found, min(most, len(found)), replace=False)
            yield channel, np.stack(np.unravel_index(found, label_map.shape), axis=1)


def _read_isotropic(path: Path, order: int) -> np.ndarray:
    """A NIfTI volume in RAS at FINE_MM: nearest neighbour (order 0) or linear (order 1)."""
    image = nib.as_closest_canonical(nib.load(path))
    array = np.asanyarray(image.dataobj)
    zoom = np.asarray(image.header.get_zooms()[:3]) / FINE_MM
    array = array.astype(np.uint8 if order == 0 else np.float32)
    if order == 1:
        # Average what a coarser voxel covers, as the resampling of inference does.
        array = ndimage.gaussian_filter(array, 0.5 * np.maximum(0, 1 / zoom - 1))
    return np.asarray(ndimage.zoom(array, zoom, order=order, grid_mode=True, mode="nearest"))


def _hull_distance_mm(label_map: np.ndarray, closing_mm: float = 40.0) -> np.ndarray:
    """Signed distance to the closed hull of the labelled tissue, mm at COARSE_MM."""
    step = round(COARSE_MM / FINE_MM)
    labelled = label_map[::step, ::step, ::step] > 0
    margin = int(closing_mm / COARSE_MM) + SKIN_MARGIN
    # Axial slices at the ends continue, so that closing does not round them off.
    padded = np.pad(labelled, ((margin, margin), (margin, margin), (0, 0)))
    padded = np.pad(padded, ((0, 0), (0, 0), (margin, margin)), mode="edge")
    near = ndimage.distance_transform_edt(~padded) * COARSE_MM < closing_mm
    hull = ndimage.distance_transform_edt(near) * COARSE_MM > closing_mm - COARSE_MM / 2
    inner = (slice(margin - SKIN_MARGIN, -margin + SKIN_MARGIN),) * 3
    return _signed_distance_mm(hull[inner])


def _signed_distance_mm(inside: np.ndarray) -> np.ndarray:
    """Distance in mm to the edge of `inside` (on the COARSE_MM grid), positive outside of it."""
    outside = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    return np.asarray(outside * COARSE_MM, dtype=np.float32)


def _add_femur_heads(label_map: np.ndarray, names: dict[int, str]) -> list[str]:
    """Label the head of each femur: what lies within 27 mm of where it meets the hip bone."""
    value_of = {name: value for value, name in names.items()}
    added = []
    for side in ("left", "right"):
        femur = label_map == value_of.get(f"femur_{side}", 255)
        hip = label_map == value_of.get(f"hip_{side}", 255)
        if not femur.any() or not hip.any():
            continue
        contact = femur & (ndimage.distance_transform_edt(~hip) * FINE_MM < 6)
        if contact.sum() < 50:
            continue
        centre = np.argwhere(contact).mean(0)
        around = np.argwhere(femur)
        head = around[np.linalg.norm(around - centre, axis=1) * FINE_MM < 27]
        value = max(names) + 1
        label_map[tuple(head.T)] = value
        names[value] = f"femur_head_{side}"
        added.append(names[value])
    return added


def load_anatomies(data: Path, hold_out: tuple[str, ...] = ()) -> list[Anatomy]:
    """Read the folders of open data that may be trained on, except those held out.

    Raises:
        UsageError: `data` holds none of them.
    """
    found = []
    for folder, (classes, weight) in _FOLDERS.items():
        path = data / folder
        if folder not in hold_out and (path / "labels.nii.gz").is_file():
            found.append(_load(path, classes, weight))
    if not found:
        raise UsageError(f"No training data in {data}: expected folders {', '.join(_FOLDERS)}.")
    return found


_FOLDERS: dict[str, tuple[list[str], float]] = {
    "totalsegmentator_s0327": (_TOTALSEGMENTATOR_V2 + _LESIONS, 3.2),
    "totalsegmentator_s0328": (_TOTALSEGMENTATOR_V2 + _LESIONS, 3.8),
    "totalsegmentator_slab": (_TOTALSEGMENTATOR_V2, 0.8),
    "totalsegmentator_aorta": (["aorta", "celiac_trunk"], 0.3),
    "totalsegmentator_example": (_TOTALSEGMENTATOR_V2[:-1], 3.0),
    "totalsegmentator_liver_vessels": (
        _LIVER_VESSELS + ["liver_tumor", "hepatic_vessel_tumor"],
        0.4,
    ),
    "visible_human_male": ([*_VISIBLE_HUMAN, "prostate"], 0.7),
    "visible_human_female": ([*_VISIBLE_HUMAN, "prostate"], 0.7),
}


def _load(path: Path, classes: list[str], weight: float) -> Anatomy:
    names = {int(k): v for k, v in json.loads((path / "labels.json").read_text()).items()}
    label_map = _read_isotropic(path / "labels.nii.gz", order=0)
    ct = None
    if (path / "ct.nii.gz").is_file():
        ct = _read_isotropic(path / "ct.nii.gz", order=1)
    annotated = classes + _add_femur_heads(label_map, names)
    skin = None
    has_skin = "body" in names.values()
    if has_skin:
        step = round(COARSE_MM / FINE_MM)
        inside = np.pad(label_map[::step, ::step, ::step] > 0, SKIN_MARGIN, mode="edge")
        skin = _signed_distance_mm(inside)
        body = next(value for value, name in names.items() if name == "body")
        label_map[label_map == body] = 0  # unknown tissue: filled like unlabelled tissue
        del names[body]
    elif ct is None:
        skin = _hull_distance_mm(label_map)
    channels = tuple(sorted(INDEX[name] for name in annotated))
    return Anatomy(path.name, label_map, names, channels, weight, skin, has_skin, ct)


def phantom_anatomy(seed: int, weight: float = 1.0) -> Anatomy:
    """A generated phantom as a source; every class but the lesions' own kinds is in it."""
    body = phantom.generate(seed, spacing_mm=FINE_MM, lesions=False)
    return Anatomy(
        f"phantom_{seed}", body.label_map, body.names, tuple(range(len(CLASSES))), weight
    )
