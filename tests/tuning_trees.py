"""Scans of one's own in the layouts that fine-tuning reads: fat with balls of other tissue."""

import json
from pathlib import Path

import numpy as np
from anatomies import ball
from dataset_trees import write_nifti

SHAPE = (20, 18, 16)
SPACING_MM = 4.0
HU = {"liver": 110, "vertebrae_L1": 400, "hip_left": 300, "hip_right": 320}
CENTRES = {
    "liver": (14, 10, 8),
    "vertebrae_L1": (10, 5, 8),
    "hip_left": (5, 9, 4),
    "hip_right": (15, 4, 4),
}


def affine() -> np.ndarray:
    return np.diag([SPACING_MM] * 3 + [1.0])


def scan(seed: int, names: tuple[str, ...] = tuple(HU)) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """HU (X, Y, Z) int16, and a mask of each structure, a little elsewhere for each seed."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(-90, 10, SHAPE)
    hu[0] = -1000
    masks = {}
    for name in names:
        masks[name] = ball(SHAPE, tuple(np.array(CENTRES[name]) + rng.uniform(-1, 1, 3)), 2.5)
        hu[masks[name]] = HU[name]
    return hu.astype(np.int16), masks


def label_map(masks: dict[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    for value, name in enumerate(names, start=1):
        labels[masks[name]] = value
    return labels


def write_folder(
    folder: Path, seed: int, names: tuple[str, ...] = tuple(HU), *, masks: bool = False
) -> Path:
    """One case: a label map with its names, or a mask per structure."""
    hu, found = scan(seed, names)
    write_nifti(folder / "ct.nii.gz", hu, affine())
    if masks:
        for name, mask in found.items():
            path = folder / "segmentations" / f"{name}.nii.gz"
            write_nifti(path, mask.astype(np.uint8), affine())
        return folder
    write_nifti(folder / "labels.nii.gz", label_map(found, names), affine())
    values = {str(value): name for value, name in enumerate(names, start=1)}
    (folder / "labels.json").write_text(json.dumps(values))
    return folder


def write_folders(root: Path, cases: int = 4, **options: bool) -> Path:
    for seed in range(cases):
        write_folder(root / f"case_{seed}", seed, **options)
    return root


def write_nnunet(root: Path, cases: int = 3, tests: int = 1) -> Path:
    names = tuple(HU)
    for seed in range(cases + tests):
        split = "Tr" if seed < cases else "Ts"
        hu, found = scan(seed)
        write_nifti(root / f"images{split}/ct_{seed}_0000.nii.gz", hu, affine())
        labels = label_map(found, names)
        write_nifti(root / f"labels{split}/ct_{seed}.nii.gz", labels, affine())
    labels = {"background": 0, **{name: value for value, name in enumerate(names, start=1)}}
    labels["bones"] = [2, 3, 4]
    index = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": cases}
    (root / "dataset.json").write_text(json.dumps({**index, "file_ending": ".nii.gz"}))
    return root


def write_table(root: Path, cases: int = 3) -> Path:
    """Masks of one structure, and a label map of which a line names one value."""
    lines = ["image,label,class,value"]
    for seed in range(cases):
        hu, found = scan(seed)
        write_nifti(root / f"scans/{seed}.nii.gz", hu, affine())
        mask = found["vertebrae_L1"].astype(np.uint8)
        write_nifti(root / f"masks/{seed}_L1.nii.gz", mask, affine())
        write_nifti(root / f"maps/{seed}.nii.gz", label_map(found, ("liver", "hip_left")), affine())
        lines.append(f"scans/{seed}.nii.gz,masks/{seed}_L1.nii.gz,vertebra L1,")
        lines.append(f"scans/{seed}.nii.gz,maps/{seed}.nii.gz,Liver,1")
    table = root / "table.csv"
    table.write_text("\n".join(lines))
    return table
