"""A CT as a network reads it: oriented, resampled, and its HU normalised."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from foundation.config import Preprocessing
from foundation.imaging.frame import Frame, window_hu
from foundation.imaging.volumes import Source, Volume, read_ct

if TYPE_CHECKING:
    from torch import Tensor

RAS = "RAS"


def preprocess(ct: Source, preprocessing: Preprocessing) -> Tensor:
    """Read a CT as the input of a network.

    Args:
        ct: Path of a NIfTI file, nibabel image, (array in HU, affine), or `Volume`.
        preprocessing: Of the network.

    Returns:
        (C, X, Y, Z) float32, along the axes of `preprocessing.orientation`, at its spacing.

    Raises:
        VolumeError: The CT cannot be read.
    """
    import torch  # listing files and data must not wait for it

    volume = read_ct(ct)
    hu = frame_of(volume, preprocessing).to_network(volume)
    turned = np.ascontiguousarray(reorient(hu, RAS, preprocessing.orientation))
    return normalise_hu(torch.from_numpy(turned), preprocessing)


def frame_of(volume: Volume, preprocessing: Preprocessing) -> Frame:
    """Make the frame that takes a CT to a network's spacing.

    Args:
        volume: The CT.
        preprocessing: Of the network, whose spacing lies along the axes of its orientation.

    Returns:
        The frame. Its grid is RAS, whatever the orientation of the network.
    """
    spacing_mm = [0.0, 0.0, 0.0]
    for axis, mm in zip(ras_axes(preprocessing.orientation), preprocessing.spacing_mm, strict=True):
        spacing_mm[axis] = mm
    return Frame.of(volume, spacing_mm)


def ras_axes(orientation: str) -> tuple[int, ...]:
    """Return for each axis of an orientation ("LPS") the index of the RAS axis it runs along."""
    return tuple(int(axis) for axis in nib.orientations.axcodes2ornt(orientation)[:, 0])


def reorient(array: NDArray, source: str, target: str) -> NDArray:
    """Permute and flip the axes of an array (X, Y, Z).

    Args:
        array: Along the axes of `source`.
        source: NIfTI axis codes, such as "RAS".
        target: NIfTI axis codes of the result.

    Returns:
        A view of the array, along the axes of `target`.
    """
    start, end = (nib.orientations.axcodes2ornt(codes) for codes in (source, target))
    return np.asarray(nib.apply_orientation(array, nib.orientations.ornt_transform(start, end)))


def normalise_hu(hu: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalise HU as a network reads them.

    Args:
        hu: The CT (X, Y, Z), HU.
        preprocessing: Of the network.

    Returns:
        Its input (C, X, Y, Z), a channel a window: in [0, 1], or standardised by `hu_mean_std`.
    """
    import torch

    if not preprocessing.hu_mean_std:
        return window_hu(hu, preprocessing.hu_windows)
    channels = zip(preprocessing.hu_windows, preprocessing.hu_mean_std, strict=True)
    return torch.stack(
        [(hu.clamp(low, high) - mean) / deviation for (low, high), (mean, deviation) in channels]
    )
