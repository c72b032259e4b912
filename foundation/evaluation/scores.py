"""The scores of masks: a row for each class of each scan, and what is computed of the rows.

Every comparison of a mask with a reference goes through `score_masks`: the validation of a training
run, the measurements before and after a fine-tuning, the benchmarks, `universal-ct evaluate`.

A scan whose reference does not show a class counts for no mean of that class, as in the paper. Its
row stays, with the volume that was predicted there.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from foundation.errors import UsageError
from foundation.evaluation.detection import Finding
from foundation.evaluation.intervals import Interval, bootstrap, mean_of
from foundation.evaluation.metrics import (
    Mask,
    SurfaceDistances,
    Tolerance,
    dice,
    surface_distances,
    tolerance_of,
    volume_ml,
)
from foundation.files import replacing
from foundation.settings import read, read_file

FORMAT_VERSION = 2
Metric = Literal[
    "dice",
    "nsd",
    "hd95_mm",
    "volume_difference_ml",
    "volume_error_ml",
    "volume_error_percent",
]
Status = Literal["present", "empty", "no prediction"]


@dataclass(frozen=True)
class Score:
    """One class in one scan.

    Attributes:
        case: Key of the scan.
        name: Of the class.
        dice: In [0, 1]; None unless `status` is "present".
        nsd: Surface Dice, in [0, 1]; None where it was not measured.
        hd95_mm: Robust Hausdorff distance, mm; None where it was not measured, and where the mask
            is empty: it is infinite then, and `missed` says so.
        reference_ml: Volume in the reference; None where it was not measured.
        predicted_ml: Volume in the mask.
        status: "present": the reference shows the class. "empty": it labels the class and shows
            none; what was predicted is a false positive. "no prediction": the reference labels the
            class, and whoever made the masks gave none for it, not even an empty one.
    """

    case: str
    name: str
    dice: float | None
    nsd: float | None = None
    hd95_mm: float | None = None
    reference_ml: float | None = None
    predicted_ml: float | None = None
    status: Status = "present"

    @property
    def missed(self) -> bool:
        """Whether the reference shows the class, and the mask is empty."""
        return self.status == "present" and self.predicted_ml == 0

    @property
    def false_positive(self) -> bool:
        """Whether the mask shows what the reference labels and does not show."""
        return self.status == "empty" and bool(self.predicted_ml)

    @property
    def volume_difference_ml(self) -> float | None:
        """Volume of the mask less that of the reference; its mean is the bias."""
        if self.predicted_ml is None or self.reference_ml is None:
            return None
        return self.predicted_ml - self.reference_ml

    @property
    def volume_error_ml(self) -> float | None:
        """The size of that difference."""
        difference = self.volume_difference_ml
        return None if difference is None else abs(difference)

    @property
    def volume_error_percent(self) -> float | None:
        """The size of that difference, as a share of the reference's volume; None without one."""
        if self.volume_error_ml is None or not self.reference_ml:
            return None
        return 100 * self.volume_error_ml / self.reference_ml


_COLUMNS = tuple(each.name for each in fields(Score))


@dataclass(frozen=True)
class Scores:
    """Every class in every scan that labels it.

    Attributes:
        rows: One for each; also where the reference is empty.
        tolerance_mm: Of the surface Dice: one, or class name → its own; None: not measured.
        spacing_mm: Of the grid on which the masks were compared; None where each scan has its own.
        findings: What was found of tumours, where that was asked for.
    """

    rows: tuple[Score, ...]
    tolerance_mm: Tolerance | None
    spacing_mm: float | None = None
    findings: tuple[Finding, ...] = ()

    @classmethod
    def joined(cls, parts: Iterable[Scores]) -> Scores:
        """Put the scores of several scans together.

        Args:
            parts: At least one; all measured with one tolerance.

        Raises:
            UsageError: There is none, or the tolerances differ.
        """
        every = list(parts)
        if not every:
            raise UsageError("No scores to put together: no scan was measured.")
        first = every[0]
        if any(part.tolerance_mm != first.tolerance_mm for part in every):
            raise UsageError("Scores of different tolerances cannot be put together.")
        alike = all(part.spacing_mm == first.spacing_mm for part in every)
        return cls(
            tuple(row for part in every for row in part.rows),
            first.tolerance_mm,
            first.spacing_mm if alike else None,
            tuple(finding for part in every for finding in part.findings),
        )

    @cached_property
    def present(self) -> tuple[Score, ...]:
        """The rows whose reference shows the class: the ones that means are over."""
        return tuple(row for row in self.rows if row.status == "present")

    @cached_property
    def cases(self) -> tuple[str, ...]:
        """Keys of the scans that show any class, in the order of the rows."""
        return tuple(dict.fromkeys(row.case for row in self.present))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that any scan shows, in the order of the rows."""
        return tuple(dict.fromkeys(row.name for row in self.present))

    def table(
        self, classes: Sequence[str], metric: Metric = "dice", cases: Sequence[str] | None = None
    ) -> NDArray[np.float64]:
        """Arrange the values of a metric as a table.

        Args:
            classes: Its columns.
            metric: "dice", "nsd", or another number of `Score`.
            cases: Keys of the scans that are its rows; `self.cases` if not given.

        Returns:
            (cases, classes), NaN where a scan does not show a class.
        """
        keys = self.cases if cases is None else cases
        table = np.full((len(keys), len(classes)), np.nan)
        row_of = {key: row for row, key in enumerate(keys)}
        column_of = {name: column for column, name in enumerate(classes)}
        for each in self.present:
            if each.case in row_of and each.name in column_of:
                value = getattr(each, metric)
                table[row_of[each.case], column_of[each.name]] = np.nan if value is None else value
        return table

    def mean(self, classes: Sequence[str], metric: Metric = "dice") -> float | None:
        """Compute the mean over scans, then over the classes shown in any; None without one."""
        return mean_of(self.table(classes, metric))

    def interval(self, classes: Sequence[str], metric: Metric = "dice") -> Interval:
        """Estimate where that mean lies with 95 % confidence, over scans; see `bootstrap`."""
        return bootstrap(self.table(classes, metric))

    def by_case(self, classes: Sequence[str], metric: Metric = "dice") -> dict[str, float]:
        """Compute each scan's mean over the classes that it shows; without any, it is left out."""
        table = self.table(classes, metric)
        shown = ~np.isnan(table).all(axis=1)
        keys = [self.cases[row] for row in np.flatnonzero(shown)]
        return dict(zip(keys, np.nanmean(table[shown], axis=1).tolist(), strict=True))

    def write(self, path: str | Path) -> Path:
        """Write as .json, or the rows alone as .csv.

        Args:
            path: A name with one of these endings.

        Raises:
            UsageError: The path ends otherwise.
        """
        path = Path(path)
        if path.suffix not in (".json", ".csv"):
            raise UsageError(f"Cannot write scores to {path}: name it .json or .csv.")
        with replacing(path) as temporary:
            if path.suffix == ".json":
                content = {"format_version": FORMAT_VERSION, **asdict(self)}
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            else:
                with temporary.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, [*_COLUMNS, "volume_error_percent"])
                    writer.writeheader()
                    writer.writerows(
                        {**asdict(row), "volume_error_percent": row.volume_error_percent}
                        for row in self.rows
                    )
        return path

    @classmethod
    def read(cls, path: str | Path) -> Scores:
        """Read what `write` wrote as .json.

        Raises:
            UsageError: The file is missing, damaged, or of another format version.
        """
        return read(cls, read_file(path), str(path), version=FORMAT_VERSION)


def score_masks(
    case: str,
    mask_of: Callable[[str], Mask | None],
    references: Iterable[tuple[str, Mask]],
    spacing_mm: Sequence[float],
    tolerance_mm: Tolerance | None = None,
    known: Mask | None = None,
    hd95: bool = False,
) -> Iterator[Score]:
    """Compare masks with references, class by class.

    Args:
        case: Key of the scan, for the rows.
        mask_of: Class name → mask (X, Y, Z), bool; None where there is no prediction of that class.
            Called once for each reference.
        references: Pairs of a class name and its mask on the same grid.
        spacing_mm: Distance between voxel centres along X, Y and Z.
        tolerance_mm: Of the surface Dice; it is not computed if not given, which saves time.
        known: (X, Y, Z), bool; voxels outside count for neither side. All count if not given.
        hd95: Also compute the robust Hausdorff distance.

    Yields:
        A row for each reference, also where it is empty; see `Score.status`.
    """
    for name, reference in references:
        mask = mask_of(name)
        if known is not None:
            reference = reference & known
        reference_ml = volume_ml(reference, spacing_mm)
        if mask is None:
            status: Status = "no prediction"
            yield Score(case, name, None, reference_ml=reference_ml, status=status)
            continue
        if known is not None:
            mask = mask & known
        overlap = dice(mask, reference)
        measured: dict[str, Any] = {
            "reference_ml": reference_ml,
            "predicted_ml": volume_ml(mask, spacing_mm),
        }
        if overlap is not None and (hd95 or tolerance_mm is not None):
            far = surface_distances(mask, reference, spacing_mm)
            measured["nsd"] = _nsd(far, tolerance_mm, name)
            measured["hd95_mm"] = _finite(far.hausdorff_mm()) if hd95 else None
        yield Score(
            case, name, overlap, status="empty" if overlap is None else "present", **measured
        )


def _nsd(far: SurfaceDistances, tolerance_mm: Tolerance | None, name: str) -> float | None:
    return None if tolerance_mm is None else far.dice(tolerance_of(tolerance_mm, name))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
