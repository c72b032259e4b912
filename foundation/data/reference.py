"""The labels of a scan as masks of classes, on the scan's own grid: what masks are held to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foundation.data.cases import Scan
from foundation.data.meaning import Value, meaning
from foundation.imaging.sides import RIGHT, nearest_side
from foundation.taxonomy import PAIRED, in_order

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Reference:
    """The labels of one scan, in the order of its file.

    A lesion's voxels belong to its organ too. Where the labels merge the sides of a pair, the
    organ's name ("kidney") stands for both: nothing is guessed, and a prediction is compared by the
    union of its sides. The side of a lesion that has none is that of the nearest organ.

    Attributes:
        labels: (X, Y, Z), uint8 or uint16.
        affine: (4, 4), voxel index to millimetres, RAS+.
        values: What each label value stands for.
        classes: Names of what is labelled, whether a voxel shows it or not.
    """

    labels: NDArray[Any]
    affine: NDArray[np.float64]
    values: tuple[Value, ...]
    classes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        scan: Scan,
        label_map: Mapping[str, tuple[str, ...]],
        annotated: Sequence[str],
        unknown: Collection[str] = (),
    ) -> Reference:
        """Find out what the labels of a scan mean.

        Args:
            scan: As read.
            label_map: Source label → classes; two sides of a pair are a label that merges them.
            annotated: The classes that this scan labels.
            unknown: Source labels whose voxels may be anything.

        Returns:
            The reference.
        """
        values = tuple(meaning(each, label_map, annotated, unknown) for each in scan.names)
        merged = {
            pair
            for pair, both in PAIRED.items()
            if both in label_map.values() and set(both) <= set(annotated)
        }
        sides = {name for pair in merged for name in PAIRED[pair]}
        classes = [*(name for name in annotated if name not in sides), *merged]
        return cls(scan.labels, scan.affine, values, tuple(in_order(dict.fromkeys(classes))))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along the three axes of the file."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @cached_property
    def known(self) -> Mask | None:
        """Voxels that count (X, Y, Z); None where all do."""
        unknown = np.array([value.unknown for value in self.values])
        return ~unknown[self.labels] if unknown.any() else None

    def mask(self, name: str) -> Mask:
        """Return the mask of a class.

        Args:
            name: One of `classes`.

        Returns:
            (X, Y, Z), bool.
        """
        names = {name, *PAIRED.get(name, ())}
        mask = self._where([bool(names & value.classes) for value in self.values])
        for pair, both in PAIRED.items():
            if name != pair and name not in both:
                continue
            undecided = [pair in value.undecided for value in self.values]
            if not any(undecided):
                continue
            if name == pair:
                return mask | self._where(undecided)
            return mask | self._side(self._where(undecided), both, name)
        return mask

    def _side(self, undecided: Mask, both: tuple[str, str], name: str) -> Mask:
        right, left = sorted(both, reverse=True)  # "…_right" after "…_left"
        organs = [
            self._where([side in value.classes for value in self.values]) for side in (right, left)
        ]
        sides = nearest_side(undecided, *organs)
        return np.asarray((sides > 0) & ((sides == RIGHT) == (name == right)))

    def _where(self, values: Sequence[bool]) -> Mask:
        return np.asarray(np.array(values, bool)[self.labels])


def sides_of(name: str, classes: Collection[str]) -> tuple[str, ...]:
    """Return the classes whose union is a name: itself, or both sides of a pair.

    Args:
        name: Of a class, or of a pair such as "kidney".
        classes: Those that there are.

    Returns:
        Names of `classes`; none where they do not make up the name.
    """
    if name in classes:
        return (name,)
    both = PAIRED.get(name, ())
    return both if both and set(both) <= set(classes) else ()


def union_of(mask_of: Callable[[str], Mask], names: Sequence[str]) -> Mask:
    """Return what any of the classes covers.

    Args:
        mask_of: Class name → mask (X, Y, Z), bool; it is not changed.
        names: At least one.
    """
    mask = mask_of(names[0])
    for name in names[1:]:
        mask = mask | mask_of(name)
    return mask
