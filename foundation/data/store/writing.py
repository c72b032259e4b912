"""One harmonised case into its folder of the store, and what is counted of it on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from foundation.data.reading import count_values
from foundation.data.store.arrays import (
    BACKGROUND,
    CASE,
    CENTRES,
    CT,
    FILES,
    LABELS,
    write_array,
)
from foundation.data.store.harmonise import Harmonised
from foundation.files import file_sha256, sealed_json
from foundation.imaging.body import TISSUE_HU, body_mask
from foundation.taxonomy import in_order

MOST_CENTRES = 2000
PERCENTILES = (0.5, 5.0, 25.0, 50.0, 75.0, 95.0, 99.5)


def write_case(folder: Path, case: Harmonised, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write all files of one case into an empty folder.

    Args:
        folder: Of the case.
        case: What is written.
        about: What is not in it (dataset, id, sources, licence, weight …).

    Returns:
        The content of `case.json`: SHA-256 of the other files too.
    """
    boxes = ndimage.find_objects(case.labels)
    voxels = _voxels(case)
    description = {
        **about,
        "spacing_mm": case.spacing_mm,
        "shape": list(case.labels.shape),
        "affine": np.round(case.affine, 6).tolist(),
        "has_ct": case.ct is not None,
        "sets": [list(names) for names in case.sets],
        "tissues": list(case.tissues),
        "unknown": list(case.unknown),
        "annotated": list(case.annotated),
        "voxels": voxels,
        "hu_percentiles": None if case.ct is None else _percentiles(case.ct),
        "notes": list(case.notes),
    }
    if case.ct is not None:
        write_array(folder / CT, case.ct)
    write_array(folder / LABELS, case.labels)
    centres = dict(_centres(case, list(voxels), boxes))
    np.savez(folder / CENTRES, **centres)  # type: ignore[arg-type]
    description[FILES] = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    (folder / CASE).write_text(sealed_json(description), encoding="utf-8")
    return description


def _voxels(case: Harmonised) -> dict[str, int]:
    """Voxels of every class that occurs."""
    count = count_values(case.labels, len(case.sets))
    present = {name for names, n in zip(case.sets, count, strict=True) if n for name in names}
    return {
        name: int(sum(n for names, n in zip(case.sets, count, strict=True) if name in names))
        for name in in_order(present)
    }


def _percentiles(ct: NDArray[np.int16]) -> dict[str, float]:
    """Of the HU of all tissue; of everything where there is only air."""
    tissue = ct[ct > TISSUE_HU]
    values = np.percentile(tissue if tissue.size else ct, PERCENTILES)
    return {f"{p:g}": round(float(v), 1) for p, v in zip(PERCENTILES, values, strict=True)}


def _centres(
    case: Harmonised, classes: list[str], boxes: list[Any]
) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Random voxels (N, 3) of each class, and of the body outside of all classes."""
    for name in classes:
        values = [v for v, names in enumerate(case.sets) if name in names]
        table = np.isin(np.arange(len(case.sets)), values)
        parts = [boxes[v - 1] for v in values if v <= len(boxes) and boxes[v - 1] is not None]
        box = tuple(
            slice(min(p[axis].start for p in parts), max(p[axis].stop for p in parts))
            for axis in range(3)
        )
        yield name, _drawn(table[case.labels[box]], [part.start for part in box])
    free = np.array([not names for names in case.sets])
    free[list(case.unknown)] = False
    found = _drawn(free[case.labels] & _body(case), [0, 0, 0])
    if len(found):
        yield BACKGROUND, found


def _drawn(mask: NDArray[np.bool_], start: list[int]) -> NDArray[np.int32]:
    flat = np.flatnonzero(mask)
    if len(flat) > MOST_CENTRES:
        flat = np.sort(np.random.default_rng(0).choice(flat, MOST_CENTRES, replace=False))
    found = np.stack(np.unravel_index(flat, mask.shape), axis=1) + start
    return found.astype(np.int32)


def _body(case: Harmonised) -> NDArray[np.bool_]:
    """Roughly the body: from the CT; without one the box around all that is labelled."""
    inside = np.zeros(case.labels.shape, bool)
    if case.ct is not None:
        mask, steps = body_mask(case.ct, case.spacing_mm)
        for axis, step in enumerate(steps):
            mask = mask.repeat(step, axis)
        return np.asarray(mask[tuple(slice(size) for size in case.labels.shape)])
    for box in ndimage.find_objects((case.labels > 0).astype(np.uint8)):
        inside[box] = True
    return inside
