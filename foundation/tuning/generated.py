"""Generated scans with labels, in the place of a user's own: for `--smoke`, tests and examples."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from foundation.synthesis.phantom import Phantom, generate
from foundation.synthesis.render import render_ct

SMOKE_CLASS = "sacrum"
SMOKE_LABELS = (SMOKE_CLASS, "colon", "urinary_bladder", "iliopsoas_left")
_SMOKE_SPACING_MM = 3.0  # the embedded weights' own: nothing is resampled
_SMOKE_SHAPE = (64, 48, 48)


def write_scans(folder: Path, count: int, first_seed: int = 0) -> Path:
    """Write parts of generated bodies as `read_data` reads them, a folder each; return `folder`.

    Each is ct.nii.gz, labels.nii.gz and labels.json: the labels of SMOKE_LABELS around the sacrum.
    """
    for seed in range(first_seed, first_seed + count):
        hu, labels = generated_scan(seed)
        case = folder / f"generated_{seed}"
        case.mkdir(parents=True)
        affine = np.diag([*[_SMOKE_SPACING_MM] * 3, 1.0])
        for name, values in (("ct", hu), ("labels", labels)):
            nib.save(nib.Nifti1Image(values, affine), case / f"{name}.nii.gz")
        names = {str(value): name for value, name in enumerate(SMOKE_LABELS, start=1)}
        (case / "labels.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


def generated_scan(seed: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Return a part of a generated body around its sacrum, 64 × 48 × 48 voxels of 3 mm, RAS.

    Returns:
        HU, and labels: 0, or 1 + the place in SMOKE_LABELS; (X, Y, Z) each.
    """
    body = generate(seed, _SMOKE_SPACING_MM, lesions=False)
    part = _around(body, SMOKE_CLASS)
    rng = np.random.default_rng(seed)
    hu = render_ct(body.label_map[part], body.names, _SMOKE_SPACING_MM, rng)
    labels = np.zeros(_SMOKE_SHAPE, np.uint8)
    for value, name in enumerate(SMOKE_LABELS, start=1):
        labels[body.mask(name)[part]] = value
    return np.rint(hu).clip(-1024, 3071).astype(np.int16), labels


def _around(body: Phantom, name: str) -> tuple[slice, ...]:
    """The box of _SMOKE_SHAPE whose middle is that of a tissue, moved inside the body's grid."""
    middle = np.argwhere(body.mask(name)).mean(axis=0)
    starts = [
        int(np.clip(round(at - size / 2), 0, full - size))
        for at, size, full in zip(middle, _SMOKE_SHAPE, body.label_map.shape, strict=True)
    ]
    return tuple(slice(s, s + n) for s, n in zip(starts, _SMOKE_SHAPE, strict=True))
