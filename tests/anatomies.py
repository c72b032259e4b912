"""Small anatomies and folders of data, for tests of pretraining."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from foundation.pretraining.sources import INDEX, Anatomy


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
        tuple(sorted(INDEX[name] for name in annotated)),
        weight=1.0,
        ct=np.where(label_map > 1, 200, -100).astype(np.float32) if with_ct else None,
    )


def write_folder(
    path: Path,
    label_map: np.ndarray,
    names: dict[int, str],
    spacing_mm: float = 2.0,
    ct: np.ndarray | None = None,
) -> None:
    """Write arrays in RAS order as a folder of open data, stored in another orientation (LPS)."""
    path.mkdir(parents=True)
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])
    for name, array in (("labels", label_map), ("ct", ct)):
        if array is not None:
            nib.save(nib.Nifti1Image(array[::-1, ::-1], affine), path / f"{name}.nii.gz")
    named = {str(value): name for value, name in names.items()}
    (path / "labels.json").write_text(json.dumps(named), encoding="utf-8")


def write_paired_organs(data: Path) -> None:
    """A folder of data with `paired_organs` as its only label map."""
    anatomy = paired_organs()
    write_folder(data / "totalsegmentator_s0328", anatomy.label_map, dict(anatomy.names))
