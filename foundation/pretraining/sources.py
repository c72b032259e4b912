"""Where training patches come from: label maps rendered anew each time, labelled CTs, phantoms.

Each source says which classes it annotates. A label value that means nothing to the taxonomy is
background for the annotated classes; a class that is not annotated is masked out of the loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
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
_LESIONS = tuple(name for name in LESION_HOSTS if name != "hepatic_vessel_tumor")
_TOTALSEGMENTATOR_V1 = (
    *("spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver", "stomach"),
    *("aorta", "inferior_vena_cava", "portal_vein_and_splenic_vein", "pancreas"),
    *("adrenal_gland_right", "adrenal_gland_left", "duodenum", "lung_right", "lung_left"),
    *("colon", "intestine", "urinary_bladder"),
)
_TOTALSEGMENTATOR_V2 = (*_TOTALSEGMENTATOR_V1, "prostate")
_VISIBLE_HUMAN = (
    *("spleen", "kidney_right", "kidney_left", "liver", "pancreas", "duodenum", "colon"),
    *("intestine", "rectum", "urinary_bladder", "prostate"),
)
_LIVER_VESSELS = (
    *("liver", "inferior_vena_cava", "portal_vein_and_splenic_vein", "hepatic_vessel"),
    *("liver_tumor", "hepatic_vessel_tumor"),
)
# Folder → the classes it annotates, and how often it is drawn. A label map without a scan also
# annotates the lesions that the sampler grows into its organs.
_FOLDERS: dict[str, tuple[tuple[str, ...], float]] = {
    "totalsegmentator_s0327": (_TOTALSEGMENTATOR_V2 + _LESIONS, 3.2),
    "totalsegmentator_s0328": (_TOTALSEGMENTATOR_V2 + _LESIONS, 3.8),
    "totalsegmentator_slab": (_TOTALSEGMENTATOR_V2, 0.8),
    "totalsegmentator_aorta": (("aorta", "celiac_trunk"), 0.3),
    "totalsegmentator_example": (_TOTALSEGMENTATOR_V1, 3.0),
    "totalsegmentator_liver_vessels": (_LIVER_VESSELS, 0.4),
    "visible_human_male": (_VISIBLE_HUMAN, 0.7),
    "visible_human_female": (_VISIBLE_HUMAN, 0.7),
}
# Labels of these folders that are neither TotalSegmentator's nor ours; both lie in the liver.
_OWN_NAMES = {"hepatic_veins": "hepatic_vessel", "portal_vein_branches": "hepatic_vessel"}
_FEMUR_HEAD_MM = 27.0  # radius of the ball around the hip joint that counts as the head
_JOINT_GAP_MM = 6.0  # a femur's voxels this near to the hip bone are the joint


@dataclass
class Anatomy:
    """A label map (X, Y, Z; RAS) at FINE_MM isotropic, and what is known about it.

    names: label value → tissue name. annotated: channels that this source labels.
    weight: how often it is drawn, relative to the others.
    skin_mm: signed distance in mm, positive outside, on a grid of COARSE_MM that is larger by
    SKIN_MARGIN on every side; to the skin where `has_skin`, else to the hull of the labelled
    tissue, around which the sampler lays a wall and fat. None: the label map holds every tissue.
    ct (X, Y, Z): HU where the anatomy comes with a scan; the label map is then not rendered.

    membership (256, 32), bool: which channels each label value belongs to, annotated ones only.
    centres: channel → voxel positions (N, 3) of that class, to centre patches on.
    """

    name: str
    label_map: NDArray[np.uint8]
    names: Mapping[int, str]
    annotated: tuple[int, ...]
    weight: float
    skin_mm: NDArray[np.float32] | None = None
    has_skin: bool = False
    ct: NDArray[np.float32] | None = None
    membership: NDArray[np.bool_] = field(init=False)
    centres: dict[int, NDArray[np.int64]] = field(init=False)

    def __post_init__(self) -> None:
        self.membership = membership_table(self.names)
        annotated = np.zeros(len(CLASSES), dtype=bool)
        annotated[list(self.annotated)] = True
        self.membership &= annotated
        self.centres = dict(_voxels_by_class(self.label_map, self.membership))


def membership_table(names: Mapping[int, str]) -> NDArray[np.bool_]:
    """Which channels a voxel of each label value belongs to, bool (256, 32).

    A cyst's voxels belong to the kidney of its side as well, a hepatic vessel's to the liver.
    """
    table = np.zeros((256, len(CLASSES)), dtype=bool)
    for value, label in names.items():
        name = TOTALSEGMENTATOR.get(label) or _OWN_NAMES.get(label, label)
        if name in INDEX:
            table[value, INDEX[name]] = True
        if label.startswith("kidney_cyst_"):
            table[value, INDEX[label.replace("_cyst", "")]] = True
        if name == "hepatic_vessel":
            table[value, INDEX["liver"]] = True
    return table


def _voxels_by_class(
    label_map: NDArray[np.uint8], membership: NDArray[np.bool_], most: int = 2000
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Up to `most` voxel positions (N, 3) of each class present."""
    picker = np.random.default_rng(0)
    for channel in range(membership.shape[1]):
        values = np.flatnonzero(membership[:, channel])
        found = np.flatnonzero(np.isin(label_map, values)) if len(values) else np.empty(0, int)
        if len(found):
            found = picker.choice(found, min(most, len(found)), replace=False)
            yield channel, np.stack(np.unravel_index(found, label_map.shape), axis=1)


def _read_labels(path: Path) -> NDArray[np.uint8]:
    """A label map in RAS at FINE_MM, by nearest neighbour."""
    voxels, zoom = _read_canonical(path)
    return np.asarray(
        ndimage.zoom(voxels.astype(np.uint8), zoom, order=0, grid_mode=True, mode="nearest")
    )


def _read_hu(path: Path) -> NDArray[np.float32]:
    """A CT in RAS at FINE_MM, by linear interpolation."""
    voxels, zoom = _read_canonical(path)
    # Average what a coarser voxel covers, as the resampling of inference does.
    smooth = ndimage.gaussian_filter(voxels.astype(np.float32), 0.5 * np.maximum(0, 1 / zoom - 1))
    return np.asarray(ndimage.zoom(smooth, zoom, order=1, grid_mode=True, mode="nearest"))


def _read_canonical(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels (X, Y, Z) in RAS, and the factors that bring each axis to FINE_MM."""
    image: Any = nib.as_closest_canonical(nib.load(path))
    spacing_mm = np.asarray(image.header.get_zooms()[:3])
    return np.asanyarray(image.dataobj), spacing_mm / FINE_MM


def _hull_distance_mm(
    label_map: NDArray[np.uint8], closing_mm: float = 40.0
) -> NDArray[np.float32]:
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


def _skin_distance_mm(label_map: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Signed distance to the surface of a label map that holds all of the body, mm at COARSE_MM."""
    step = round(COARSE_MM / FINE_MM)
    body = label_map[::step, ::step, ::step] > 0
    return _signed_distance_mm(np.pad(body, SKIN_MARGIN, mode="edge"))


def _signed_distance_mm(inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Distance in mm to the edge of `inside` (on the COARSE_MM grid), positive outside of it."""
    outside = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    return np.asarray(outside * COARSE_MM, dtype=np.float32)


def _add_femur_heads(label_map: NDArray[np.uint8], names: dict[int, str]) -> list[str]:
    """Label the head of each femur that meets a hip bone, in place; returns the names added."""
    value_of = {name: value for value, name in names.items()}
    added = []
    for side in ("left", "right"):
        femur = label_map == value_of.get(f"femur_{side}", 255)
        hip = label_map == value_of.get(f"hip_{side}", 255)
        if not femur.any() or not hip.any():
            continue
        joint = femur & (ndimage.distance_transform_edt(~hip) * FINE_MM < _JOINT_GAP_MM)
        if joint.sum() < 50:  # an edge of the scan, not a joint
            continue
        centre = np.argwhere(joint).mean(0)
        around = np.argwhere(femur)
        head = around[np.linalg.norm(around - centre, axis=1) * FINE_MM < _FEMUR_HEAD_MM]
        value = max(names) + 1
        label_map[tuple(head.T)] = value
        names[value] = f"femur_head_{side}"
        added.append(names[value])
    return added


def load_anatomies(data: Path, hold_out: Sequence[str] = ()) -> list[Anatomy]:
    """Read the folders of open data that may be trained on, except those held out.

    A folder holds `labels.nii.gz`, `labels.json` (label value → name) and, if there is a scan,
    `ct.nii.gz` on the same grid.

    Raises:
        UsageError: `data` holds none of them, or a folder to hold out is not one of them.
    """
    known = ", ".join(_FOLDERS)
    if unknown := sorted(set(hold_out) - set(_FOLDERS)):
        raise UsageError(f"Cannot hold out {', '.join(unknown)}: choose from {known}.")
    found = [
        _load(data / folder, classes, weight)
        for folder, (classes, weight) in _FOLDERS.items()
        if folder not in hold_out and (data / folder / "labels.nii.gz").is_file()
    ]
    if not found:
        held = f" other than {', '.join(hold_out)}" if hold_out else ""
        raise UsageError(
            f"No training data in {data}{held}: expected a folder of open data with "
            f"labels.nii.gz and labels.json, named one of {known}."
        )
    return found


def _load(path: Path, classes: tuple[str, ...], weight: float) -> Anatomy:
    names = {int(k): v for k, v in json.loads((path / "labels.json").read_text()).items()}
    label_map = _read_labels(path / "labels.nii.gz")
    ct = _read_hu(path / "ct.nii.gz") if (path / "ct.nii.gz").is_file() else None
    annotated = (*classes, *_add_femur_heads(label_map, names))
    skin_mm = None
    has_skin = "body" in names.values()
    if has_skin:
        skin_mm = _skin_distance_mm(label_map)
        body = next(value for value, name in names.items() if name == "body")
        label_map[label_map == body] = 0  # unknown tissue: filled like unlabelled tissue
        del names[body]
    elif ct is None:
        skin_mm = _hull_distance_mm(label_map)
    channels = tuple(sorted(INDEX[name] for name in annotated))
    return Anatomy(path.name, label_map, names, channels, weight, skin_mm, has_skin, ct)


def phantom_anatomy(seed: int, weight: float = 1.0) -> Anatomy:
    """A generated phantom as a source: all classes are annotated, lesions are the sampler's."""
    body = phantom.generate(seed, spacing_mm=FINE_MM, lesions=False)
    return Anatomy(
        f"phantom_{seed}", body.label_map, body.names, tuple(range(len(CLASSES))), weight
    )
