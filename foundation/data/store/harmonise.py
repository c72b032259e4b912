"""One scan with its labels in the frame and the classes of the store.

RAS by permuting and flipping axes (oblique volumes are not rotated), isotropic spacing, HU clipped
to the range of scanners, left and right separate, lesions also in their organ.

Labels are sampled at the centre of each new voxel, not by majority: expert labels are smooth, so
that sampling leaves no noise; a majority would thin out what is thinner than a voxel (adrenal
glands, hepatic vessels, the celiac trunk), while sampling keeps its volume on average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from foundation.data.cases import Scan
from foundation.data.meaning import Value, meaning
from foundation.errors import VolumeError, listed
from foundation.imaging.body import midline_from_ct, midline_from_labels
from foundation.imaging.frame import Frame
from foundation.imaging.sides import UNDECIDED, nearest_side, split_sides
from foundation.imaging.volumes import Volume
from foundation.taxonomy import PAIRED, in_order

HU_RANGE = (-1024, 3071)  # of 12 bits; below it scanners write padding
FEMUR_HEAD_MM = 27.0  # radius of the ball around the hip joint that counts as the head
JOINT_GAP_MM = 6.0  # a femur's voxels this near to the hip bone are the joint
LEAST_JOINT_ML = 0.4  # less is an edge of the scan, not a joint


@dataclass(frozen=True)
class Settings:
    """How cases are harmonised.

    Attributes:
        spacing_mm: Of the store, along every axis.
        femoral_heads: Derive the heads of the femurs where a femur meets a hip bone (labels named
            as by TotalSegmentator) and the dataset has no own.
    """

    spacing_mm: float = 1.5
    femoral_heads: bool = False


@dataclass(frozen=True)
class Harmonised:
    """One case in RAS at an isotropic spacing.

    Attributes:
        ct: (X, Y, Z), int16 HU, or None.
        labels: (X, Y, Z), uint8 or uint16.
        affine: (4, 4), voxel index to millimetres, RAS+.
        spacing_mm: Along every axis.
        sets: Label value → the classes that its voxels belong to.
        tissues: Label value → what its source calls it ("a+b" where structures overlap, the most
            specific first).
        unknown: Values of which no class is known, not even that it is absent.
        annotated: Classes whose absence means absence.
        notes: What a reader of the data should know.
    """

    ct: NDArray[np.int16] | None
    labels: NDArray[Any]
    affine: NDArray[np.float64]
    spacing_mm: float
    sets: tuple[tuple[str, ...], ...]
    tissues: tuple[str, ...]
    unknown: tuple[int, ...]
    annotated: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass
class _State:
    """A case on its way: the label map on the store's grid, and what its values mean."""

    labels: NDArray[Any]
    values: list[Value]
    annotated: list[str]
    ct: NDArray[np.int16] | None
    spacing_mm: float
    notes: list[str] = field(default_factory=list)

    def having(self, wanted: str) -> NDArray[np.bool_]:
        """Voxels of this class or tissue, bool (X, Y, Z)."""
        table = np.array([wanted in v.classes or wanted in v.tissues for v in self.values])
        return np.asarray(table[self.labels])

    def rewrite(
        self, where: NDArray[np.uint8], changes: Sequence[Callable[[Value], Value]]
    ) -> None:
        """Change what voxels mean: where `where` (X, Y, Z) is i > 0, by `changes[i - 1]`."""
        old = list(self.values)
        table = np.tile(np.arange(len(old)), (len(changes) + 1, 1))
        for row, change in enumerate(changes, start=1):
            for number, value in enumerate(old):
                if change(value) != value:
                    table[row, number] = len(self.values)
                    self.values.append(change(value))
        voxels = np.flatnonzero(where)  # few of all
        self.labels = self.labels.astype(np.min_scalar_type(len(self.values)), copy=False)
        flat = self.labels.reshape(-1)
        flat[voxels] = table[where.reshape(-1)[voxels], flat[voxels]]


def harmonise(
    scan: Scan,
    label_map: Mapping[int | str, tuple[str, ...]] | Mapping[str, tuple[str, ...]],
    annotated: Sequence[str],
    unknown: Sequence[int | str] = (),
    settings: Settings = Settings(),
) -> Harmonised:
    """Bring a scan and its labels into the frame and classes of the store.

    Args:
        scan: What was read.
        label_map: Source label → classes; two sides of a pair are a merged label to be split
            (`Dataset.label_map`). A source label that it lacks is a tissue of no class.
        annotated: The classes that this case annotates; only those are kept.
        unknown: Source labels whose voxels, unless another label there names a class, are excluded
            from every loss.
        settings: Of the store.

    Returns:
        The case as the store holds it.

    Raises:
        VolumeError: CT and labels of different shapes, a label value without a name, CT voxels
            that are not finite, or all the same.
    """
    _check(scan)
    spacing = settings.spacing_mm
    shape = scan.labels.shape
    frame = Frame.of(Volume(scan.labels, scan.affine, None, shape), (spacing,) * 3)
    ct = None
    if scan.ct is not None:
        # Before resampling, lest padding of -3024 bleed into the skin.
        hu = frame.to_network(np.clip(scan.ct, *HU_RANGE))
        ct = np.rint(hu, out=hu).astype(np.int16)
    names = {str(key): classes for key, classes in label_map.items()}
    marked = {str(key) for key in unknown}
    state = _State(
        labels=_sampled(frame, scan.labels),
        values=[meaning(sources, names, set(annotated), marked) for sources in scan.names],
        annotated=list(annotated),
        ct=ct,
        spacing_mm=spacing,
    )
    _split_pairs(state)
    if settings.femoral_heads:
        _derive_femoral_heads(state)
    return _finished(state, _store_affine(frame, scan.affine, shape))


# --- grid -------------------------------------------------------------------------------------


def _check(scan: Scan) -> None:
    shape = scan.labels.shape
    if scan.labels.dtype.kind != "u" or len(shape) != 3 or 0 in shape:
        raise VolumeError(
            f"The labels are {scan.labels.dtype} of shape {shape}; they must be uint8 or uint16 "
            "along X, Y and Z."
        )
    if scan.labels.max() >= len(scan.names):
        beyond = [str(value) for value in np.unique(scan.labels) if value >= len(scan.names)]
        raise VolumeError(f"Label values {listed(beyond)} have no name in this dataset.")
    if scan.ct is None:
        return
    if scan.ct.shape != shape:
        raise VolumeError(
            f"The CT has shape {scan.ct.shape}, its labels {shape}: they must share one grid."
        )
    low, high = float(scan.ct.min()), float(scan.ct.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise VolumeError("The CT holds NaN or infinite values. Correct or remove this scan.")
    if low == high:
        raise VolumeError(f"The CT is empty: every voxel is {low:g} HU. Remove this scan.")


def _sampled(frame: Frame, labels: NDArray[Any]) -> NDArray[Any]:
    """Labels on the store's grid: of the source voxel around each new voxel's centre."""
    picks = []
    grids = zip(frame.ras_shape, frame.ras_spacing_mm, frame.shape, frame.spacing_mm, strict=True)
    for size, have, count, want in grids:
        offset = (np.arange(count) - (count - 1) / 2) * want / have  # from the common centre
        # Ties go towards the middle, so that a mirrored file gives the mirrored result.
        position = offset - np.sign(offset) * 1e-6 + (size - 1) / 2
        picks.append(np.rint(position).astype(int).clip(0, size - 1))
    return np.ascontiguousarray(frame.to_ras(labels)[np.ix_(*picks)])


def _store_affine(
    frame: Frame, affine: NDArray[np.float64], shape: Sequence[int]
) -> NDArray[np.float64]:
    """Voxel index of the store → mm: same centre and directions as the source's grid."""
    columns = np.asarray(affine, float)[:3, list(frame.axes)]
    columns = columns / np.linalg.norm(columns, axis=0) * np.where(frame.flips, -1, 1)
    centre = affine[:3, :3] @ ((np.asarray(shape) - 1) / 2) + affine[:3, 3]
    result = np.eye(4)
    result[:3, :3] = columns * frame.spacing_mm
    result[:3, 3] = centre - result[:3, :3] @ ((np.asarray(frame.shape) - 1) / 2)
    return result


# --- sides ----------------------------------------------------------------------------------


def _split_pairs(state: _State) -> None:
    """Tell the sides of merged pairs apart, in place."""
    pairs = sorted({pair for value in state.values for pair in value.undecided})
    if not pairs:
        return
    middle = _middle(state)
    for pair in pairs:
        merged = np.array([pair in value.undecided for value in state.values])[state.labels]
        right, left = (state.having(f"{pair}_{side}") for side in ("right", "left"))
        if right.any() or left.any():
            sides = nearest_side(merged, right, left)
        else:
            sides = split_sides(merged, state.spacing_mm, middle, cut_at_waist=pair == "lung")
        if (sides == UNDECIDED).any():
            _forget(state, pair)
        else:
            _divide(state, pair, sides)


def _middle(state: _State) -> float | None:
    middle = None if state.ct is None else midline_from_ct(state.ct, state.spacing_mm)
    if middle is not None:
        return middle
    names = [(*value.tissues, *value.classes) for value in state.values]
    return midline_from_labels(state.labels, names)


def _divide(state: _State, pair: str, sides: NDArray[np.uint8]) -> None:
    """Give the right and the left voxels of a merged pair a value of their own."""
    annotated = set(state.annotated)

    def change(name: str, value: Value) -> Value:
        if pair not in value.undecided:
            return value
        return replace(
            value,
            tissues=tuple(name if tissue == pair else tissue for tissue in value.tissues),
            classes=value.classes | ({name} & annotated),
            undecided=value.undecided - {pair},
        )

    # In the order of RIGHT and LEFT.
    state.rewrite(sides, [partial(change, f"{pair}_{side}") for side in ("right", "left")])


def _forget(state: _State, pair: str) -> None:
    """Annotate neither side of a pair whose sides cannot be told apart."""
    both = set(PAIRED[pair])
    state.annotated = [name for name in state.annotated if name not in both]
    state.values = [
        replace(value, undecided=value.undecided - {pair}, classes=value.classes - both)
        for value in state.values
    ]
    state.notes.append(
        f"{pair}: its side cannot be told, as the scan shows one half of the body only and no "
        "spine is labelled; neither side is annotated here."
    )


def _derive_femoral_heads(state: _State) -> None:
    """Label the head of each femur that meets a hip bone, in place."""
    voxel_ml = state.spacing_mm**3 / 1000
    for side in ("left", "right"):
        name = f"femur_head_{side}"
        if name in state.annotated:
            continue
        femur, hip = state.having(f"femur_{side}"), state.having(f"hip_{side}")
        if not femur.any() or not hip.any():
            continue
        # Distances only around the femur: the whole grid would take seconds.
        reach = int(np.ceil(JOINT_GAP_MM / state.spacing_mm)) + 1
        found = ndimage.find_objects(femur.astype(np.uint8))[0]
        box = tuple(slice(max(0, part.start - reach), part.stop + reach) for part in found)
        near = np.zeros_like(femur[box])
        if hip[box].any():
            distance = ndimage.distance_transform_edt(~hip[box]) * state.spacing_mm
            near = femur[box] & (distance < JOINT_GAP_MM)
        if near.sum() * voxel_ml < LEAST_JOINT_ML:
            continue
        centre = np.argwhere(near).mean(axis=0) + [part.start for part in box]
        around = np.argwhere(femur)
        far_mm = np.linalg.norm(around - centre, axis=1) * state.spacing_mm
        head = around[far_mm < FEMUR_HEAD_MM]
        where = np.zeros(femur.shape, np.uint8)
        where[tuple(head.T)] = 1
        state.rewrite(where, [partial(_as_head, name=name)])
        state.annotated.append(name)
        state.notes.append(f"{name}: derived from the joint of femur and hip bone.")


def _as_head(value: Value, name: str) -> Value:
    return replace(value, tissues=(name,), classes=value.classes | {name}, unknown=False)


# --- result -----------------------------------------------------------------------------------


def _finished(state: _State, affine: NDArray[np.float64]) -> Harmonised:
    """Renumber the values that occur, background first."""
    present = np.bincount(state.labels.ravel(), minlength=len(state.values)) > 0
    present[0] = True
    kept = np.flatnonzero(present)
    table = np.zeros(len(present), np.uint8 if len(kept) <= 256 else np.uint16)
    table[kept] = np.arange(len(kept))
    values = [state.values[value] for value in kept]
    if not any(value.classes for value in values):
        state.notes.append("No voxel belongs to any annotated class.")
    return Harmonised(
        ct=state.ct,
        labels=table[state.labels],
        affine=affine,
        spacing_mm=state.spacing_mm,
        sets=tuple(tuple(in_order(value.classes)) for value in values),
        tissues=tuple("+".join(value.tissues) for value in values),
        unknown=tuple(number for number, value in enumerate(values) if value.unknown),
        annotated=tuple(in_order(state.annotated)),
        notes=tuple(state.notes),
    )
