"""Anatomies to cut training patches from: prepared cases and phantoms, whole in memory.

A label map without a scan is rendered anew for each patch. Each anatomy says which classes it
annotates: a label value of none of them is background for those, and all others are masked out of
the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from foundation.errors import UsageError
from foundation.synthesis import phantom
from foundation.taxonomy import CLASSES, NAMES, TOTALSEGMENTATOR, by_name

if TYPE_CHECKING:
    from foundation.data.store.arrays import Store, StoredCase

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
_BODY = "body"  # a tissue that means: inside of the skin, and nothing more is known
_MOST_LABELS = 240  # the rest of the 256 values is for lesions and the filling of the body


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
    unknown: label values that the loss does not look at.
    centres: channel → voxel positions (N, 3) of that class, to centre patches on.
    """

    name: str
    label_map: NDArray[np.uint8]
    names: Mapping[int, str]
    membership: NDArray[np.bool_]
    annotated: tuple[int, ...]
    weight: float
    skin_mm: NDArray[np.float32] | None = None
    has_skin: bool = False
    ct: NDArray[np.float32] | None = None
    unknown: tuple[int, ...] = ()
    centres: dict[int, NDArray[np.int64]] = field(init=False)

    def __post_init__(self) -> None:
        annotated = np.zeros(len(CLASSES), dtype=bool)
        annotated[list(self.annotated)] = True
        self.membership = self.membership & annotated
        self.centres = dict(_voxels_by_class(self.label_map, self.membership))


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


def load_anatomies(
    store: Store, datasets: Sequence[str] = (), held_out: frozenset[str] = frozenset()
) -> list[Anatomy]:
    """All cases of a store that can be drawn from, except those held out.

    datasets: only of these; of all if empty. held_out: keys of cases.

    Raises:
        UsageError: nothing is left, or see `stored_anatomy`.
    """
    every = sorted(store.manifest["cases"])
    keys = [key for key in every if not datasets or key.split("/")[0] in datasets]
    cases = [store.case(key) for key in keys if key not in held_out]
    anatomies = [stored_anatomy(case) for case in cases if case.weight > 0 and case.annotated]
    if not anatomies:
        found = f"{len(keys)} cases, of which {len(keys) - len(cases)} are held out"
        raise UsageError(
            f"{store.path} has no anatomy to train on: {found}, and what has weight 0 or annotates "
            "nothing is left out."
        )
    return anatomies


def stored_anatomy(case: StoredCase) -> Anatomy:
    """A prepared case in memory: with its scan where it has one, else to be rendered.

    What is rendered also annotates the lesions that the sampler can grow into its organs.

    Raises:
        UsageError: the store has another spacing than label maps are rendered from, or the case
            has more label values than fit.
    """
    if abs(case.spacing_mm - FINE_MM) > 1e-3:
        raise UsageError(
            f"{case.key} is stored at {case.spacing_mm:g} mm; anatomies are deformed and rendered "
            f"from {FINE_MM:g} mm. Prepare them with --spacing {FINE_MM:g}."
        )
    if len(case.tissues) > _MOST_LABELS:
        raise UsageError(
            f"{case.key} has {len(case.tissues)} labels; at most {_MOST_LABELS} can be rendered."
        )
    label_map = case.read_labels().astype(np.uint8)
    names = {value: tissue for value, tissue in enumerate(case.tissues) if value}
    ct = case.read_ct()
    annotated = {name for name in case.annotated if name in INDEX}
    skin_mm, has_skin = None, False
    if ct is None:
        annotated |= _growable(annotated)
        bodies = [value for value, name in names.items() if name == _BODY]
        has_skin = bool(bodies)
        skin_mm = _skin_distance_mm(label_map) if has_skin else _hull_distance_mm(label_map)
        for value in bodies:
            label_map[label_map == value] = 0  # filled like unlabelled tissue
            del names[value]
    membership = np.zeros((256, len(CLASSES)), dtype=bool)
    membership[: len(case.tissues)] = case.membership(NAMES)
    return Anatomy(
        name=case.key,
        label_map=label_map,
        names=names,
        membership=membership,
        annotated=tuple(sorted(INDEX[name] for name in annotated)),
        weight=case.weight,
        skin_mm=skin_mm,
        has_skin=has_skin,
        ct=None if ct is None else ct.astype(np.float32),
        unknown=tuple(case.unknown),
    )


def _growable(annotated: set[str]) -> set[str]:
    """Lesions all of whose possible hosts, and the organ around them, are annotated."""
    return {
        lesion
        for lesion, hosts in LESION_HOSTS.items()
        if {*hosts, *by_name(lesion).parents} <= annotated
    }


def membership_of(names: Mapping[int, str]) -> NDArray[np.bool_]:
    """Which channels a voxel of each label value belongs to, bool (256, 32).

    names: label value → a class, or what TotalSegmentator calls it. A hepatic vessel is in the
    liver.
    """
    table = np.zeros((256, len(CLASSES)), dtype=bool)
    for value, label in names.items():
        name = TOTALSEGMENTATOR.get(label, label)
        for positive in (name, "liver") if name == "hepatic_vessel" else (name,):
            if positive in INDEX:
                table[value, INDEX[positive]] = True
    return table


def phantom_anatomy(seed: int, weight: float = 1.0) -> Anatomy:
    """A generated phantom: all classes are annotated; its lesions are the sampler's."""
    body = phantom.generate(seed, spacing_mm=FINE_MM, lesions=False)
    everything = tuple(range(len(CLASSES)))
    membership = membership_of(body.names)
    return Anatomy(f"phantom_{seed}", body.label_map, body.names, membership, everything, weight)
