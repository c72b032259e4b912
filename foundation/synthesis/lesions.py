"""Lesions grown into the organs of a label map."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from foundation.synthesis.fields import one_of, smooth_noise
from foundation.taxonomy import by_name

# Lesion → the organs that it grows in.
LESION_HOSTS = {
    "kidney_tumor": ("kidney_left", "kidney_right"),
    "kidney_cyst": ("kidney_left", "kidney_right"),
    "liver_tumor": ("liver",),
    "pancreas_tumor": ("pancreas",),
    "hepatic_vessel_tumor": ("hepatic_vessel",),
    "lung_tumor": ("lung_left", "lung_right"),
    "colon_tumor": ("colon",),
}
FIRST_LESION = 201  # label value; the sources' own are below it, but for crowded label maps
_RADIUS_MM = (4.0, 28.0)


def growable(annotated: Collection[str]) -> set[str]:
    """Return the lesions whose hosts, and the organ around them, are all annotated.

    Only then is every voxel outside of a grown lesion known to be free of it.

    Args:
        annotated: Names of classes.

    Returns:
        Names of lesions.
    """
    return {
        lesion
        for lesion, hosts in LESION_HOSTS.items()
        if {*hosts, *by_name(lesion).parents} <= {*annotated}
    }


def grow_lesion(
    labels: Tensor,
    sets: dict[int, frozenset[str]],
    names: dict[int, str],
    annotated: Collection[str],
    spacing_mm: float,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> None:
    """Turn a lumpy ball inside an organ into a lesion with label values of its own, in place.

    Nothing happens where the organ of the drawn lesion is not in the patch.

    Args:
        labels: Label values (X, Y, Z), RAS; changed.
        sets: Label value → the classes that its voxels belong to; new values are added.
        names: Label value → tissue; new values are added.
        annotated: Classes that the source labels. Other lesions are not grown.
        spacing_mm: Of the grid of `labels`, isotropic.
        rng: The source of chance for places and sizes.
        generator: The source of chance for the surface.
    """
    lesions = [name for name in LESION_HOSTS if name in annotated]
    if not lesions:
        return
    lesion = lesions[int(rng.integers(len(lesions)))]
    host = _of_classes(labels, sets, [v for v in names if v < FIRST_LESION], LESION_HOSTS[lesion])
    candidates = host.reshape(-1).nonzero()[:, 0]
    if not len(candidates):
        return
    seed = int(candidates[int(rng.integers(len(candidates)))])
    box, ball = _lumpy_ball(tuple(labels.shape), seed, spacing_mm, rng, generator)
    organ = host[box]
    if lesion == "hepatic_vessel_tumor":  # it lies in the liver around a vessel
        organ = _of_classes(labels[box], sets, sets, ("liver",))
    value = max(FIRST_LESION, max(names) + 1)
    # A value for each tissue that it grows into: a lesion over both lungs belongs to both.
    inside = ball & organ
    for tissue in labels[box][inside].unique().tolist():
        sets[value] = (sets.get(tissue, frozenset()) - {"hepatic_vessel"}) | {lesion}
        names[value] = lesion
        labels[box][inside & (labels[box] == tissue)] = value
        value += 1
        if value > 255:
            return


def _of_classes(
    labels: Tensor,
    sets: Mapping[int, frozenset[str]],
    values: Collection[int],
    classes: Collection[str],
) -> Tensor:
    """Voxels (X, Y, Z), bool, whose label is one of `values` and belongs to any of the classes."""
    return one_of(labels, [v for v in values if not sets.get(v, frozenset()).isdisjoint(classes)])


def _lumpy_ball(
    shape: tuple[int, ...],
    seed: int,
    spacing_mm: float,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> tuple[tuple[slice, ...], Tensor]:
    """A random ellipsoid with a lumpy surface around a flat voxel index of a grid of `shape`.

    Returns the box of the grid that holds it, and the ball in that box, bool.
    """
    origin = np.unravel_index(seed, shape)
    radius = np.exp(rng.uniform(*np.log(_RADIUS_MM))) / spacing_mm
    reach = int(radius * 1.6) + 2
    box = tuple(
        slice(max(0, int(o) - reach), min(n, int(o) + reach + 1))
        for o, n in zip(origin, shape, strict=True)
    )
    x, y, z = (
        (torch.arange(s.start, s.stop) - int(o)) / (radius * rng.uniform(0.75, 1.25))
        for s, o in zip(box, origin, strict=True)
    )
    distance = (x[:, None, None] ** 2 + y[None, :, None] ** 2 + z[None, None] ** 2).sqrt()
    lumps = smooth_noise(tuple(distance.shape), 0.7 * radius, generator)
    return box, distance + 0.12 * lumps < 1
