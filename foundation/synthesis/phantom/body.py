"""One body being painted: its canvas, its random stream, and what was placed where."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foundation.synthesis.phantom.shapes import Canvas, Floats, curve

Array = NDArray[np.float64]
Points = Sequence[tuple[float, float, float]]

# The order is the label value. Sternum and costal cartilage count as ribs, discs as muscle.
# fmt: off
TISSUES = (
    "air", "skin", "fat", "muscle", "vertebrae", "spinal_cord", "ribs", "hip_left", "hip_right",
    "sacrum", "femur_left", "femur_right", "femur_head_left", "femur_head_right", "heart",
    "iliopsoas_left", "iliopsoas_right", "autochthon_left", "autochthon_right", "gluteus_left",
    "gluteus_right", "lung_left", "lung_right", "esophagus", "stomach", "duodenum", "small_bowel",
    "colon", "rectum", "liver", "gallbladder", "spleen", "pancreas", "kidney_left", "kidney_right",
    "adrenal_gland_left", "adrenal_gland_right", "urinary_bladder", "prostate", "uterus", "aorta",
    "inferior_vena_cava", "portal_vein_and_splenic_vein", "hepatic_vessel", "celiac_trunk",
    "iliac_artery_left", "iliac_artery_right", "iliac_vena_left", "iliac_vena_right",
    "kidney_tumor", "kidney_cyst", "liver_tumor", "hepatic_vessel_tumor", "pancreas_tumor",
    "lung_tumor", "colon_tumor",
)
# fmt: on
FREE = "free"  # the cavity before organs claim it; what stays free becomes fat
SIDES = (("right", 1.0), ("left", -1.0))


def shifted(point: Array, x: float, y: float, z: float) -> Array:
    """Return a point moved along the body's axes.

    Args:
        point: (3,), in mm.
        x: To the right, in mm.
        y: To the front, in mm.
        z: To the head, in mm.

    Returns:
        (3,), in mm.
    """
    return np.asarray(point + np.array([x, y, z]))


class Body:
    """Paints organs with random errors. Earlier organs keep their voxels: small ones come first.

    Attributes:
        cavity: (X, Y, Z), below 1 inside the trunk's cavity; set by `frame`.
        below_dome: bool (X, Y, Z), under the diaphragm; set by `frame`.
        solids: Name of a painted ellipsoid → its centre (3,) and half axes (3,), in mm.
        lines: Name of a painted tube → its centre line (N, 3) and radii (N,), in mm.
    """

    cavity: Floats
    below_dome: NDArray[np.bool_]

    def __init__(self, canvas: Canvas, rng: np.random.Generator) -> None:
        self.canvas = canvas
        self.rng = rng
        self.solids: dict[str, tuple[Array, Array]] = {}
        self.lines: dict[str, tuple[Array, Array]] = {}

    def near(self, x: float, y: float, z: float, sd_mm: float = 4.0) -> Array:
        """Draw a position with a random error.

        Args:
            x: To the right, in mm.
            y: To the front, in mm.
            z: To the head, in mm.
            sd_mm: Standard deviation of the error along each axis.

        Returns:
            (3,), in mm.
        """
        return np.array([x, y, z]) + self.rng.normal(0, sd_mm, 3)

    def about(self, *lengths: float, sd: float = 0.1) -> Array:
        """Scale lengths together by a random factor, and each by another small one.

        Args:
            *lengths: In mm.
            sd: Standard deviation of the logarithm of the common factor; of each one's, half.

        Returns:
            (N,), in mm.
        """
        factor = np.exp(self.rng.normal(0, sd)) * np.exp(self.rng.normal(0, sd / 2, len(lengths)))
        return np.asarray(np.array(lengths) * factor)

    def solid(
        self,
        name: str,
        centre: Array,
        half_axes: Array,
        over: Sequence[str] = (FREE,),
        *,
        turn: Array | None = None,
        rough: float = 0.06,
        where: NDArray[np.bool_] | None = None,
    ) -> None:
        """Paint an ellipsoid and remember it, so that lesions can be placed in it.

        Args:
            name: Of the tissue.
            centre: (3,), in mm.
            half_axes: (3,), in mm.
            over: Tissues that it replaces.
            turn: Rotation matrix (3, 3); not turned if not given.
            rough: How much noise moves the surface.
            where: bool (X, Y, Z), a further condition on voxels.
        """
        self.canvas.ellipsoid(name, centre, half_axes, over, turn=turn, rough=rough, where=where)
        self.solids[name] = (centre, half_axes)

    def pipe(
        self,
        name: str,
        points: Points,
        radii: ArrayLike,
        over: Sequence[str] = (FREE,),
        sd_mm: float = 3.0,
    ) -> None:
        """Paint a tube through control points with random errors and size, and remember it.

        Args:
            name: Of the tissue.
            points: Control points, in mm.
            radii: One for each point, or one for all, in mm.
            over: Tissues that it replaces.
            sd_mm: Standard deviation of the error of each point along each axis.
        """
        knots = np.array(points, float) + self.rng.normal(0, sd_mm, (len(points), 3))
        line, radius = curve(knots, np.asarray(radii, float) * np.exp(self.rng.normal(0, 0.1)))
        self.canvas.tube(name, line, radius, over)
        self.lines[name] = (line, radius)
