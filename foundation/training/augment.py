"""Augmentation of real scans: as published, as the embedded weights learn, and for few scans.

The three draw other numbers in another order, and weights that were trained depend on every draw;
so they stand side by side, and share what they do with what was drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from foundation.errors import UsageError
from foundation.synthesis import deform
from foundation.synthesis.anatomy import Anatomy
from foundation.synthesis.fields import look_up, rotation
from foundation.synthesis.render import contrast_shift
from foundation.synthesis.scanner import AIR_HU, blur
from foundation.synthesis.view import View
from foundation.training.crops import Volumes

_GAIN, _OFFSET_HU, _NOISE_HU = 0.08, 20.0, 20.0
_BLURRED, _BLUR_VOXELS = 0.3, (0.3, 0.9)
_TURN_RAD, _STRETCH = (0.08, 0.08, 0.16), (0.12, 0.07)  # about X Y Z; of all axes, of each


# --- as published ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AugmentationConfig:
    """The paper's augmentation.

    Attributes:
        zoom: Range of enlargement.
        zoom_probability: In [0, 1], as are the others.
        rotate_probability: Of a turn by quarters in the axial plane.
        shift: Largest change of the image, which lies in [0, 1].
        shift_probability: Of that change.

    Raises:
        UsageError: A value is not allowed.
    """

    zoom: tuple[float, float] = (1.3, 1.5)
    zoom_probability: float = 0.0
    rotate_probability: float = 0.1
    shift: float = 0.1
    shift_probability: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise UsageError(f"zoom is {self.zoom}; give (low, high).")
        for name in ("zoom_probability", "rotate_probability", "shift_probability"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UsageError(f"{name} is {value}; a probability lies in [0, 1].")


def draw_zoom(augmentation: AugmentationConfig, rng: np.random.Generator) -> float:
    """Draw by how much the patch is enlarged; 1 for not at all."""
    if rng.random() >= augmentation.zoom_probability:
        return 1.0
    return float(rng.uniform(*augmentation.zoom))


def rotate(augmentation: AugmentationConfig, volumes: Volumes, rng: np.random.Generator) -> Volumes:
    """Turn the volumes (X, Y, Z) together by quarters in the axial plane, or leave them."""
    if rng.random() >= augmentation.rotate_probability:
        return volumes
    quarters = int(rng.integers(1, 4))
    first = volumes[0]
    if first.shape[0] != first.shape[1]:
        quarters = 2  # a quarter would exchange the sides
    hu, labels, inside = (torch.rot90(volume, quarters, (0, 1)) for volume in volumes)
    return hu, labels, inside


def shift(augmentation: AugmentationConfig, image: Tensor, rng: np.random.Generator) -> Tensor:
    """Add one number to an image (C, X, Y, Z) in [0, 1], or none; not clipped, as published."""
    if rng.random() >= augmentation.shift_probability:
        return image
    return image + float(rng.uniform(-augmentation.shift, augmentation.shift))


# --- as the embedded weights learn ----------------------------------------------------------------


def deform_scan(
    anatomy: Anatomy,
    size: int,
    spacing_mm: float,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> View:
    """Draw one view of an anatomy's scan: deformed, its grey values varied.

    It is placed and deformed as `synthesis.draw_view` does it with label maps, which are rendered.

    Args:
        anatomy: One with a scan.
        size: Voxels of the view along each axis.
        spacing_mm: Of the view, isotropic.
        rng: The source of chance for single numbers.
        generator: The source of chance for fields.
    """
    assert anatomy.ct is not None, f"{anatomy.name} has no scan"
    centre = deform.draw_centre(anatomy, size * spacing_mm, rng)
    positions = deform.draw_positions(size, 1, spacing_mm, centre, (), rng, generator)
    labels = deform.gather(torch.from_numpy(anatomy.label_map), positions, fill=0)
    hu = deform.interpolate(torch.from_numpy(anatomy.ct), positions)
    hu = _vary_contrast(hu, labels, anatomy.names, rng)
    hu = hu * rng.uniform(1 - _GAIN, 1 + _GAIN) + rng.normal(0, 8)
    if rng.random() < _BLURRED:
        hu = torch.from_numpy(ndimage.gaussian_filter(hu.numpy(), rng.uniform(0.3, 1.0)))
    hu = _add_noise(hu, rng, generator)
    covered = deform.draw_field_of_view(anatomy, positions, 1, rng)
    hu[~covered] = AIR_HU
    return View(hu, labels, anatomy.names, anatomy.sets, covered)


def _vary_contrast(
    hu: Tensor, labels: Tensor, names: Mapping[int, str], rng: np.random.Generator
) -> Tensor:
    """Perhaps give labelled organs the grey values of another contrast phase."""
    if rng.random() >= 0.6:
        return hu
    change = look_up(contrast_shift(names, rng), labels)
    # Organs pass into each other softly, and gas and fat take up no contrast.
    change = functional.avg_pool3d(change[None, None], 3, 1, 1)[0, 0]
    return hu + change * (hu > -150)


def _add_noise(hu: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    return hu + rng.uniform(0, _NOISE_HU) * torch.randn(hu.shape, generator=generator)


# --- for few scans --------------------------------------------------------------------------------


def vary(hu: Tensor, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
    """Show a scan (X, Y, Z) in HU as another scanner might: gain, offset, sharpness, noise."""
    if rng.random() < _BLURRED:
        hu = blur(hu, rng.uniform(*_BLUR_VOXELS))
    hu = hu * rng.uniform(1 - _GAIN, 1 + _GAIN) + rng.uniform(-_OFFSET_HU, _OFFSET_HU)
    return _add_noise(hu, rng, generator)


def draw_lattice(
    read: Sequence[int],
    size: NDArray[np.int64],
    grid: Sequence[int],
    rng: np.random.Generator,
) -> Tensor:
    """Draw where in a part of a scan a turned and stretched patch lies, around the part's middle.

    Args:
        read: Voxels of the part along X, Y and Z.
        size: Voxels (3,) of the part that the patch takes, before it is turned and stretched.
        grid: The patch's own voxels along X, Y and Z.
        rng: The source of chance.

    Returns:
        Places (X, Y, Z, 3) in the coordinates of `grid_sample`, with axes in the order Z, Y, X.
    """
    stretch = np.exp(rng.normal(0, _STRETCH[0]) + rng.normal(0, _STRETCH[1], 3)).clip(0.75, 1.3)
    matrix = rotation(rng.normal(0, _TURN_RAD)) @ np.diag(size / 2 / stretch)
    matrix = 2 * matrix / np.asarray(read)[:, None]
    lines = [torch.linspace(-1 + 1 / n, 1 - 1 / n, n) for n in grid]
    plain = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
    return (plain @ torch.from_numpy(matrix.T).float()).flip(-1)


def on_lattice(volumes: Volumes, lattice: Tensor) -> Volumes:
    """Take volumes (x, y, z) at the places (X, Y, Z, 3) of a lattice: HU linear, labels nearest."""
    hu, labels, inside = volumes
    turned = functional.grid_sample(
        hu[None, None], lattice[None], "bilinear", "border", align_corners=False
    )
    return turned[0, 0], nearest(labels, lattice), nearest(inside, lattice)


def nearest(values: Tensor, lattice: Tensor) -> Tensor:
    """Take values (x, y, z) at the places (…, 3) of a lattice; 0 outside. For up to 2²⁴ values."""
    places = lattice.reshape(1, 1, 1, -1, 3)
    found = functional.grid_sample(
        values[None, None].float(), places, "nearest", "zeros", align_corners=False
    )
    return found.view(lattice.shape[:-1]).to(values.dtype)
