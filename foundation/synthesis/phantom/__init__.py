"""A generated abdominal phantom: stylised organs with random anatomy, from a seed, no data needed.

Each organ is a simple solid given by equations — ellipsoids, elliptical cylinders and swept
tubes, partly cut by the body wall or the diaphragm — the idea of the stylised phantoms of
radiation dosimetry: Snyder et al., MIRD Pamphlet No. 5 Revised (1978), and Cristy and Eckerman,
ORNL/TM-8381 (1987). The constants, the warp and the random anatomy are ours, set by eye so that a
rendered CT resembles an adult from the lung bases to the hips. It is no patient and no reference.

Body frame: mm, x to the patient's right, y to the front, z to the head, origin midway between the
femoral heads. `shapes` paints solids, `frame` builds the body wall and skeleton, `organs` the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foundation.errors import UsageError
from foundation.synthesis.phantom import frame, organs
from foundation.synthesis.phantom.body import FREE, TISSUES, Body
from foundation.synthesis.phantom.shapes import Canvas, Floats

__all__ = ["TISSUES", "Phantom", "generate"]

_Z_RANGE_MM = (-48.0, 398.0)  # from below the femoral heads to the heart


@dataclass(frozen=True)
class Phantom:
    """A label map with its names.

    Attributes:
        label_map: uint8 (X, Y, Z) in RAS order: X grows to the patient's right, Y to the front, Z
            up.
        names: Label value → tissue name in TotalSegmentator's style; 0 is the air outside.
        spacing_mm: Along each axis.
        affine: (4, 4), voxel index → mm in RAS.
        seed: From which it was drawn.
    """

    label_map: NDArray[np.uint8]
    names: dict[int, str]
    spacing_mm: tuple[float, float, float]
    affine: NDArray[np.float64]
    seed: int

    def mask(self, name: str) -> NDArray[np.bool_]:
        """Return where a tissue is.

        Args:
            name: One of `TISSUES`.

        Returns:
            bool (X, Y, Z); all False where this phantom lacks the tissue.

        Raises:
            UsageError: The name is not among `TISSUES`.
        """
        if name not in TISSUES:
            raise UsageError(f"Unknown tissue {name!r}. A phantom has: {', '.join(TISSUES)}.")
        return np.asarray(self.label_map == TISSUES.index(name))


def generate(seed: int, spacing_mm: float = 4.0, lesions: bool = True) -> Phantom:
    """Draw one anatomy and sample it on a grid.

    The same seed gives the same anatomy at every spacing, with or without lesions.

    Args:
        seed: 0 or above.
        spacing_mm: Isotropic, 0.5 to 20.
        lesions: Whether the phantom may have lesions.

    Returns:
        The phantom.

    Raises:
        UsageError: `seed` or `spacing_mm` is out of range.
    """
    if seed < 0:
        raise UsageError(f"seed is {seed}; give 0 or a positive number.")
    if not 0.5 <= spacing_mm <= 20:
        raise UsageError(f"spacing_mm is {spacing_mm}; a phantom can be sampled at 0.5 to 20 mm.")
    # Independent streams: adding a draw to one stage leaves the others' anatomy as it was.
    build, warp, anatomy, disease = (
        np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(4)
    )
    female = bool(build.random() < 0.5)
    size = (0.94 if female else 1.02) * build.normal(1, 0.04) * build.normal(1, 0.04, 3)
    fat_mm = float(np.clip(18 * np.exp(build.normal(0, 0.5)), 5, 48))
    belly_mm = float(np.clip(0.4 * fat_mm - 5 + build.normal(0, 6), -6, 24))

    half = np.array(frame.half_axes_mm(fat_mm, belly_mm)) + 22  # air, and room for the warp
    low = np.array([-half[0], -half[1], _Z_RANGE_MM[0]]) * size
    counts = np.ceil((np.array([*half, _Z_RANGE_MM[1]]) * size - low) / spacing_mm).astype(int)
    axes: list[Floats] = [
        ((low[i] + (np.arange(counts[i]) + 0.5) * spacing_mm) / size[i]).astype(np.float32)
        for i in range(3)
    ]
    body = Body(Canvas([*TISSUES, FREE], axes, warp), anatomy)
    frame.build(body, fat_mm, belly_mm)
    organs.fill(body, female)
    if lesions:
        body.rng = disease
        organs.grow_lesions(body)
    labels = body.canvas.labels
    labels[labels == len(TISSUES)] = TISSUES.index("fat")
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = low + spacing_mm / 2
    spacing = float(spacing_mm)
    return Phantom(labels, dict(enumerate(TISSUES)), (spacing, spacing, spacing), affine, seed)
