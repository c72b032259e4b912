"""Small anatomies and stores of them, for tests of pretraining."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from foundation.data.store.arrays import FORMAT_VERSION, Store
from foundation.data.store.harmonise import Harmonised
from foundation.data.store.writing import write_case
from foundation.synthesis.anatomy import FINE_MM, Anatomy, sets_of


def ball(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float):
    """Voxels within `radius` of `centre`, bool (X, Y, Z)."""
    grid = np.indices(shape).reshape(3, -1).T
    inside = np.linalg.norm(grid - np.asarray(centre), axis=1) < radius
    return inside.reshape(shape)


def paired_organs(with_ct: bool = False) -> Anatomy:
    """Two kidneys on their sides and a liver above, in fat: (60, 48, 60) voxels of 2 mm.

    with_ct: as a scan, 200 HU in the organs and -100 HU around them, instead of as a label map.
    """
    shape = (60, 48, 60)
    names = {1: "fat", 2: "kidney_left", 3: "kidney_right", 4: "liver"}
    label_map = np.ones(shape, np.uint8)
    label_map[ball(shape, (14, 24, 20), 9)] = 2
    label_map[ball(shape, (45, 24, 20), 9)] = 3
    label_map[ball(shape, (36, 24, 44), 11)] = 4
    annotated = ["kidney_left", "kidney_right", "liver"]
    if not with_ct:
        annotated += ["kidney_tumor", "kidney_cyst", "liver_tumor"]
    return Anatomy(
        "paired_organs",
        label_map,
        names,
        sets_of(names),
        tuple(annotated),
        weight=1.0,
        ct=np.where(label_map > 1, 200, -100).astype(np.float32) if with_ct else None,
    )


def write_anatomies(path: Path, cases: dict[str, Harmonised], weight: float = 1.0) -> Store:
    """A store of these cases, of one dataset called "open"."""
    entries = {}
    for name, case in cases.items():
        folder = path / "cases" / "open" / name
        folder.mkdir(parents=True)
        about = {"dataset": "open", "id": name, "weight": weight, "sources": []}
        entries[f"open/{name}"] = {
            **write_case(folder, case, about),
            "folder": f"cases/open/{name}",
        }
    manifest = {"format_version": FORMAT_VERSION, "spacing_mm": FINE_MM, "cases": entries}
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return Store(path)


def harmonised(
    label_map: np.ndarray,
    tissues: Sequence[str],
    annotated: Sequence[str],
    ct: np.ndarray | None = None,
    spacing_mm: float = FINE_MM,
    unknown: tuple[int, ...] = (),
) -> Harmonised:
    """A case whose tissues, from value 1 on, are classes of the same names where they are known."""
    sets = tuple((name,) if name in annotated else () for name in ("", *tissues))
    return Harmonised(
        ct=None if ct is None else ct.astype(np.int16),
        labels=label_map.astype(np.uint8),
        affine=np.diag([spacing_mm] * 3 + [1.0]),
        spacing_mm=spacing_mm,
        sets=sets,
        tissues=("", *tissues),
        unknown=unknown,
        annotated=tuple(annotated),
    )


def write_paired_organs(path: Path) -> Store:
    """A store with the label map of `paired_organs` as its only case."""
    organs = ("kidney_left", "kidney_right", "liver")
    case = harmonised(paired_organs().label_map, ("fat", *organs), organs)
    return write_anatomies(path, {"pair": case})
