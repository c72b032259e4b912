"""Where voxels lie in the body: grids that cannot be, and headers that tell of two grids."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import ArrayLike, NDArray

from foundation.errors import VolumeError
from foundation.imaging.nifti import SUPPORTED

SPACING_LIMITS_MM = (0.02, 50.0)
FARTHEST_MM = 1e5  # from the origin of a scanner's room
SPACING_SHARE = 0.01  # two spacings that differ by more are two
TURN_DEGREES = 1.0  # … and two directions
SHIFT_MM = 2.0  # … and two places of the middle


def checked_affine(given: ArrayLike | None, label: str) -> NDArray[np.float64]:
    """Check the affine of a volume.

    Args:
        given: (4, 4), voxel index to millimetres.
        label: Names the volume in an error.

    Returns:
        The affine.

    Raises:
        VolumeError: It is missing, not finite or singular, or its spacing or its place is not
            that of a CT.
    """
    if given is None:
        raise VolumeError(f"{label} has no affine: where its voxels lie is unknown. {SUPPORTED}")
    affine = np.asarray(given, float)
    columns = affine[:3, :3]
    if not np.isfinite(affine).all():
        raise VolumeError(f"{label} has an affine that is not finite. Correct its header.")
    spacing = np.linalg.norm(columns, axis=0)
    low, high = SPACING_LIMITS_MM
    if spacing.min() < low or spacing.max() > high:
        raise VolumeError(
            f"{label} has spacing {np.round(spacing, 5).tolist()} mm; allowed is {low} to {high} "
            "mm. Correct its header (zero spacing, or metres or microns in place of millimetres?)."
        )
    if abs(np.linalg.det(columns / spacing)) < 1e-3:
        raise VolumeError(
            f"{label} has a singular affine: two of its axes point the same way. "
            "Correct its header, or convert it again from the original."
        )
    if np.abs(affine[:3, 3]).max() > FARTHEST_MM:
        raise VolumeError(
            f"{label} lies at {affine[:3, 3].tolist()} mm, more than {FARTHEST_MM / 1000:g} m from "
            "the origin. Correct its header, or convert it again from the original."
        )
    return affine


def check_shape(shape: tuple[int, ...], label: str) -> None:
    """Check that an array is one volume of more than one slice.

    Args:
        shape: Of the array; one frame more counts as none.
        label: Names the volume in an error.

    Raises:
        VolumeError: It is not.
    """
    if len(shape) < 3 or min(shape) < 1:
        what = "is empty" if shape and min(shape) < 1 else "is not a volume"
        raise VolumeError(f"{label} {what}: its shape is {shape}; give a 3-D CT.")
    if any(frames != 1 for frames in shape[3:]):
        raise VolumeError(
            f"{label} has shape {shape}: more than one frame. Give one 3-D volume, e.g. "
            "nibabel.load(path).slicer[..., 0]."
        )
    if min(shape[:3]) < 2:
        raise VolumeError(
            f"{label} has shape {shape}: a single slice is not a volume. Give the whole CT."
        )


def header_doubts(
    header: Any, pixdim_mm: ArrayLike, shape: tuple[int, ...], label: str
) -> list[str]:
    """Compare what a NIfTI header says of its grid in two or three places: sform, qform, pixdim.

    The sform is used where there is one. Anonymisers and converters that change only one of them
    leave sizes, sides or places that may be wrong.

    Args:
        header: Of the file.
        pixdim_mm: The three spacings as they are stored.
        shape: Of the voxels.
        label: Names the volume in a doubt.

    Returns:
        Doubts, in sentences.
    """
    has_sform, has_qform = (int(header[f"{kind}_code"]) > 0 for kind in ("sform", "qform"))
    if not has_sform and not has_qform:
        return [
            f"{label} does not say how it lies in the body (sform and qform code 0): "
            "left and right may be swapped. Set the orientation in its header."
        ]
    if not has_sform:
        return []
    advice = (
        "The sform is used. If it is wrong, so are sides, sizes and volumes: compare it with the "
        "original, or convert that again."
    )
    sform = np.asarray(header.get_sform(), float)
    if has_qform:
        try:
            qform = np.asarray(header.get_qform(), float)
        except (HeaderDataError, ValueError):
            return [f"{label} has a qform that is no rotation, beside its sform. {advice}"]
        if difference := _contradiction(sform, qform, shape[:3]):
            return [f"{label} tells of two grids: its sform has {difference} (qform). {advice}"]
    stored = np.asarray(pixdim_mm, float)
    spacing = np.linalg.norm(sform[:3, :3], axis=0)
    if (stored > 0).all() and _unequal(spacing, stored):
        ours, theirs = (" × ".join(f"{mm:.4g}" for mm in each) for each in (spacing, stored))
        return [f"{label} tells of two spacings: {ours} mm (sform) and {theirs} (pixdim). {advice}"]
    return []


def grid_difference(
    affine: NDArray[np.float64],
    shape: tuple[int, ...],
    grid_affine: NDArray[np.float64],
    grid_shape: tuple[int, ...],
) -> str:
    """Word how a grid differs from another.

    Args:
        affine: (4, 4), voxel index to millimetres, RAS+.
        shape: Its voxels.
        grid_affine: (4, 4) of the other.
        grid_shape: Its voxels.

    Returns:
        E.g. "shape 10×10×9, not 10×10×10".
    """

    def described(matrix: NDArray[np.float64], shape: tuple[int, ...]) -> dict[str, str]:
        spacing = np.linalg.norm(matrix[:3, :3], axis=0)
        centre = matrix @ [*((np.array(shape) - 1) / 2), 1]
        return {
            "shape": "×".join(map(str, shape)),
            "orientation": "".join(str(code) for code in nib.aff2axcodes(matrix)),
            "spacing": " × ".join(f"{mm:.4g}" for mm in spacing) + " mm",
            "centre": " ".join(f"{mm:.1f}" for mm in centre[:3]) + " mm",
        }

    ours, theirs = described(affine, shape), described(grid_affine, grid_shape)
    unlike = [f"{key} {ours[key]}, not {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    return "; ".join(unlike) or "its axes point in slightly other directions"


def _contradiction(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], shape: tuple[int, ...]
) -> str:
    """How two grids of one header differ; "" where that is rounding, or too little to matter."""
    spacing, other = (np.linalg.norm(each[:3, :3], axis=0) for each in (ours, theirs))
    if not (spacing.all() and other.all() and np.isfinite(theirs).all()):
        return grid_difference(ours, shape, theirs, shape)
    cosines = (ours[:3, :3] / spacing * (theirs[:3, :3] / other)).sum(axis=0)
    degrees = float(np.rad2deg(np.arccos(cosines.clip(-1, 1))).max())
    middle = np.array([*((np.array(shape) - 1) / 2), 1])
    shift_mm = float(np.linalg.norm((ours @ middle - theirs @ middle)[:3]))
    if not (_unequal(spacing, other) or degrees > TURN_DEGREES or shift_mm > SHIFT_MM):
        return ""
    turned = f"axes that point up to {degrees:.0f}° elsewhere; " if degrees > TURN_DEGREES else ""
    return turned + grid_difference(ours, shape, theirs, shape)


def _unequal(spacing: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    return bool((np.abs(spacing / other - 1) > SPACING_SHARE).any())
