"""Anatomies to cut training patches from: prepared cases and phantoms, whole in memory.

A label map without a scan is rendered anew for each patch. Each anatomy says which classes it
annotates: a label value of none of them is background for those, and all others are masked out of
the loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from foundation.errors import UsageError
from foundation.synthesis import phantom
from foundation.synthesis.lesions import growable
from foundation.taxonomy import NAMES, TOTALSEGMENTATOR, in_order

if TYPE_CHECKING:
    from foundation.data.store.arrays import Store, StoredCase

FINE_MM = 2.0  # label maps are kept and rendered at this spacing
COARSE_MM = 4.0  # spacing of the skin map
SKIN_MARGIN = 16  # voxels by which the skin map is larger than its label map, on every side
_BODY = "body"  # a tissue that means: inside of the skin, and nothing more is known
_MOST_LABELS = 240  # the rest of the 256 values is for lesions and the filling of the body


@dataclass
class Anatomy:
    """A label map, and what is known about it.

    Attributes:
        name: For logs and errors.
        label_map: uint8 (X, Y, Z), RAS, at FINE_MM isotropic.
        names: Label value → tissue.
        sets: Label value → the classes that its voxels belong to; only annotated ones are kept.
        annotated: Classes that this source labels: those of the taxonomy in its order, then others.
        weight: How often the anatomy is drawn, relative to the others.
        skin_mm: Signed distance in mm, positive outside, on a grid of COARSE_MM that is larger by
            SKIN_MARGIN on every side: to the skin where `has_skin`, else to the hull of the
            labelled tissue, around which a wall and fat are laid. None if the label map holds
            every tissue.
        ct: HU (X, Y, Z) where the anatomy comes with a scan; its label map is then not rendered.
        unknown: Label values that the loss does not look at.
        centres: Class → voxel positions (N, 3) of it, to centre patches on; classes that occur.
    """

    name: str
    label_map: NDArray[np.uint8]
    names: Mapping[int, str]
    sets: Mapping[int, frozenset[str]]
    annotated: tuple[str, ...]
    weight: float
    skin_mm: NDArray[np.float32] | None = None
    has_skin: bool = False
    ct: NDArray[np.float32] | None = None
    unknown: tuple[int, ...] = ()
    centres: dict[str, NDArray[np.int64]] = field(init=False)

    def __post_init__(self) -> None:
        self.annotated = tuple(in_order({*self.annotated}))
        self.sets = {value: names & {*self.annotated} for value, names in self.sets.items()}
        self.centres = dict(self._voxels_by_class())

    def _voxels_by_class(self, most: int = 2000) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Up to `most` voxel positions (N, 3) of each class present, the taxonomy's first."""
        picker = np.random.default_rng(0)
        for name in self.annotated:
            values = [value for value, classes in self.sets.items() if name in classes]
            found = np.flatnonzero(np.isin(self.label_map, values)) if values else np.empty(0, int)
            if len(found):
                found = picker.choice(found, min(most, len(found)), replace=False)
                yield name, np.stack(np.unravel_index(found, self.label_map.shape), axis=1)


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
    """Read all cases of a store that can be drawn from, except those held out.

    Args:
        store: Prepared at FINE_MM.
        datasets: Only of these; of all if empty.
        held_out: Keys of cases.

    Returns:
        The anatomies, sorted by key.

    Raises:
        UsageError: Nothing is left, or a case cannot be used; see `stored_anatomy`.
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
    """Read a prepared case: with its scan where it has one, else to be rendered.

    What is rendered also annotates the lesions that can be grown into its organs.

    Args:
        case: Prepared at FINE_MM.

    Returns:
        The anatomy, whole in memory.

    Raises:
        UsageError: The case is stored at another spacing than label maps are rendered from, or has
            more label values than fit.
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
    annotated = {*case.annotated}
    skin_mm, has_skin = None, False
    if ct is None:
        annotated |= growable(annotated)
        bodies = [value for value, name in names.items() if name == _BODY]
        has_skin = bool(bodies)
        skin_mm = _skin_distance_mm(label_map) if has_skin else _hull_distance_mm(label_map)
        for value in bodies:
            label_map[label_map == value] = 0  # filled like unlabelled tissue
            del names[value]
    return Anatomy(
        name=case.key,
        label_map=label_map,
        names=names,
        sets={value: frozenset(classes) for value, classes in enumerate(case.sets)},
        annotated=tuple(annotated),
        weight=case.weight,
        skin_mm=skin_mm,
        has_skin=has_skin,
        ct=None if ct is None else ct.astype(np.float32),
        unknown=tuple(case.unknown),
    )


def membership_of(sets: Mapping[int, Collection[str]], classes: Sequence[str]) -> NDArray[np.bool_]:
    """Return to which classes the voxels of each label value belong.

    Args:
        sets: Label value, at most 255 → the classes that its voxels belong to.
        classes: The K classes that are asked about; any names.

    Returns:
        bool (256, K).
    """
    table = np.zeros((256, len(classes)), dtype=bool)
    for value, names in sets.items():
        table[value] = [name in names for name in classes]
    return table


def sets_of(names: Mapping[int, str]) -> dict[int, frozenset[str]]:
    """Return the classes that the voxels of each label value belong to.

    A hepatic vessel is in the liver.

    Args:
        names: Label value → a class of the taxonomy, or what TotalSegmentator calls it.

    Returns:
        Label value → names of classes; none for a tissue of no class.
    """
    found = {}
    for value, label in names.items():
        name = TOTALSEGMENTATOR.get(label, label)
        classes = {name, "liver"} if name == "hepatic_vessel" else {name}
        found[value] = frozenset(classes & {*NAMES})
    return found


def phantom_anatomy(seed: int, weight: float = 1.0) -> Anatomy:
    """Generate a phantom, of which all classes are annotated.

    It has no lesions: views grow them.

    Args:
        seed: Of the phantom.
        weight: How often it is drawn, relative to other anatomies.

    Returns:
        The anatomy.
    """
    body = phantom.generate(seed, spacing_mm=FINE_MM, lesions=False)
    return Anatomy(
        f"phantom_{seed}", body.label_map, body.names, sets_of(body.names), NAMES, weight
    )
