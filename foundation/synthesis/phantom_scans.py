"""Phantoms rendered and written as scans: for the demo without a network, and to try recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from foundation.files import replacing
from foundation.synthesis.phantom import Phantom, generate
from foundation.synthesis.render import render_ct

Part = tuple[slice, ...]

SPACING_MM = 3.0  # the embedded weights' own: nothing is resampled
SMOKE_CLASS = "sacrum"  # no class of the taxonomy, and bone, which is learnt in a few steps
SMOKE_LABELS = (SMOKE_CLASS, "colon", "urinary_bladder", "iliopsoas_left")
_SMOKE_SHAPE = (64, 48, 48)
_WHOLE: Part = (slice(None),) * 3


def phantom_ct(path: Path, seed: int) -> Path:
    """Write the CT of a whole phantom as NIfTI: int16 HU, RAS, 3 mm.

    Args:
        path: The file; it appears whole.
        seed: Of the phantom and its rendering.

    Returns:
        `path`.
    """
    body = generate(seed, SPACING_MM)
    with replacing(path) as temporary:
        _write(temporary, _rendered(body, _WHOLE), body.affine)
    return path


def write_scans(folder: Path, count: int, first_seed: int = 0) -> Path:
    """Write parts of phantoms as labelled scans, a folder each.

    Each folder holds ct.nii.gz, labels.nii.gz and labels.json: SMOKE_LABELS around the sacrum.

    Args:
        folder: Receives the folders.
        count: How many.
        first_seed: Of the first; the others follow.

    Returns:
        `folder`.
    """
    names = {str(value): name for value, name in enumerate(SMOKE_LABELS, start=1)}
    affine = np.diag([*[SPACING_MM] * 3, 1.0])
    for seed in range(first_seed, first_seed + count):
        hu, labels = generated_scan(seed)
        case = folder / f"generated_{seed}"
        case.mkdir(parents=True)
        _write(case / "ct.nii.gz", hu, affine)
        _write(case / "labels.nii.gz", labels, affine)
        (case / "labels.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


def generated_scan(seed: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Render the part of a phantom around its sacrum, 64 × 48 × 48 voxels of 3 mm, RAS.

    Args:
        seed: Of the phantom and its rendering.

    Returns:
        HU (X, Y, Z), and labels (X, Y, Z): 0, or 1 + the place in SMOKE_LABELS.
    """
    body = generate(seed, SPACING_MM, lesions=False)
    part = _around(body, SMOKE_CLASS)
    labels = np.zeros(_SMOKE_SHAPE, np.uint8)
    for value, name in enumerate(SMOKE_LABELS, start=1):
        labels[body.mask(name)[part]] = value
    return _rendered(body, part), labels


def _rendered(body: Phantom, part: Part) -> NDArray[np.int16]:
    rng = np.random.default_rng(body.seed)
    hu = render_ct(body.label_map[part], body.names, SPACING_MM, rng)
    return np.rint(hu).astype(np.int16)


def _around(body: Phantom, name: str) -> Part:
    """The box of _SMOKE_SHAPE whose middle is that of a tissue, moved inside the body's grid."""
    middle = np.argwhere(body.mask(name)).mean(axis=0)
    starts = [
        int(np.clip(round(at - size / 2), 0, full - size))
        for at, size, full in zip(middle, _SMOKE_SHAPE, body.label_map.shape, strict=True)
    ]
    return tuple(slice(s, s + n) for s, n in zip(starts, _SMOKE_SHAPE, strict=True))


def _write(path: Path, values: NDArray[Any], affine: NDArray[np.float64]) -> None:
    image: Any = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"generated phantom, no patient"
    nib.save(image, path)
