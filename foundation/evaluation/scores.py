"""How a model does on scans: Dice and surface Dice of each class in each scan, with intervals.

The surface Dice (NSD) is the share of both surfaces that lies within a tolerance of the other one.
A surface is the voxels of a mask that have a face neighbour outside of it; distances are between
centres of voxels, in mm. A tolerance below the voxel size asks for the very same voxels. Reference:
Nikolov et al., 2021 (arXiv 1809.04430); deviation: surface voxels count alike, whatever area of
the surface passes through them.
"""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from tqdm import tqdm

from foundation.data.store.arrays import StoredCase
from foundation.errors import UsageError
from foundation.evaluation.metrics import dice
from foundation.files import replacing
from foundation.imaging.bits import pack, unpack
from foundation.imaging.volumes import VolumeWarning
from foundation.inference.predict import segment_volume
from foundation.inference.sliding_window import Network

FEWEST_CASES = 3  # for an interval: fewer say nothing of the scatter between scans
DRAWS = 2000
FORMAT_VERSION = 1
Metric = Literal["dice", "nsd"]
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Score:
    """One class in one scan: Dice and surface Dice, both in [0, 1]."""

    case: str
    name: str
    dice: float
    nsd: float


@dataclass(frozen=True)
class Scores:
    """Every class in every scan that labels it and where it is present.

    tolerance_mm: of the surface Dice. spacing_mm: of the grid on which it was measured.
    """

    rows: tuple[Score, ...]
    tolerance_mm: float
    spacing_mm: float

    @cached_property
    def cases(self) -> tuple[str, ...]:
        """Keys of the scans, in the order of the rows."""
        return tuple(dict.fromkeys(row.case for row in self.rows))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the rows."""
        return tuple(dict.fromkeys(row.name for row in self.rows))

    def table(
        self, classes: Sequence[str], metric: Metric = "dice", cases: Sequence[str] | None = None
    ) -> NDArray[np.float64]:
        """Values (cases, classes), NaN where a scan does not show a class."""
        keys = self.cases if cases is None else cases
        table = np.full((len(keys), len(classes)), np.nan)
        row_of = {key: row for row, key in enumerate(keys)}
        column_of = {name: column for column, name in enumerate(classes)}
        for each in self.rows:
            if each.case in row_of and each.name in column_of:
                table[row_of[each.case], column_of[each.name]] = getattr(each, metric)
        return table

    def mean(self, classes: Sequence[str], metric: Metric = "dice") -> float | None:
        """Mean over scans, then over the classes that any scan shows; None without one."""
        return mean_of(self.table(classes, metric))

    def interval(self, classes: Sequence[str], metric: Metric = "dice") -> Interval:
        """Where that mean lies with 95 % confidence, over scans like these; see `bootstrap`."""
        return bootstrap(self.table(classes, metric))

    def by_case(self, classes: Sequence[str], metric: Metric = "dice") -> dict[str, float]:
        """Mean over the classes that each scan shows; scans that show none are left out."""
        table = self.table(classes, metric)
        shown = ~np.isnan(table).all(axis=1)
        keys = [self.cases[row] for row in np.flatnonzero(shown)]
        return dict(zip(keys, np.nanmean(table[shown], axis=1).tolist(), strict=True))

    def write(self, path: str | Path) -> Path:
        """Write as .json, or the rows alone as .csv.

        Raises:
            UsageError: the path ends otherwise.
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
                    writer = csv.DictWriter(file, ["case", "name", "dice", "nsd"])
                    writer.writeheader()
                    writer.writerows(asdict(row) for row in self.rows)
        return path

    @classmethod
    def read(cls, path: str | Path) -> Scores:
        """Read what `write` wrote as .json.

        Raises:
            UsageError: it cannot be read as scores.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format_version") != FORMAT_VERSION:
                raise ValueError("another format version")
            rows = tuple(Score(**row) for row in content.pop("rows"))
            return cls(rows, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} cannot be read as scores: {error!r}.") from error


def mean_of(table: NDArray[np.float64]) -> float | None:
    """Mean over rows, then over columns, of what is no NaN; None where all is."""
    return _means(table[None])[0]


def bootstrap(
    values: Sequence[float] | NDArray[np.float64], confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The interval in which the mean lies, by drawing scans anew, with replacement.

    values (N,), or (N, classes) with NaN where a scan does not show a class: then of the mean over
    classes of the means over scans. None for fewer than three scans: an interval would be made up.
    Classes of one scan are drawn together, since they fail together.
    """
    table = np.asarray(values, dtype=float)
    table = table[:, None] if table.ndim == 1 else table
    table = table[~np.isnan(table).all(axis=1)]
    if len(table) < FEWEST_CASES:
        return None
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(table), size=(DRAWS, len(table)))
    found = [mean for mean in _means(table[drawn]) if mean is not None]
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _means(tables: NDArray[np.float64]) -> list[float | None]:
    """As `mean_of`, for tables (T, N, classes)."""
    there = ~np.isnan(tables)
    seen = there.sum(axis=1)
    by_class = np.nansum(tables, axis=1) / np.maximum(seen, 1)
    classes = (seen > 0).sum(axis=1)
    means = np.where(seen > 0, by_class, 0).sum(axis=1) / np.maximum(classes, 1)
    return [float(mean) if n else None for mean, n in zip(means, classes, strict=True)]


def surface_dice(
    mask: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> float | None:
    """Surface Dice of two masks (X, Y, Z), in [0, 1]; None where the reference is empty."""
    if not reference.any():
        return None
    if not mask.any():
        return 0.0
    found = ndimage.find_objects((mask | reference).astype(np.uint8))[0]
    # A border of nothing, so that a mask that ends with the grid has a surface there.
    ours, theirs = (np.pad(each[found], 1) for each in (mask, reference))
    surfaces = [each & ~ndimage.binary_erosion(each) for each in (ours, theirs)]
    near = 0
    for surface, other in (surfaces, surfaces[::-1]):
        distance_mm = ndimage.distance_transform_edt(~other, sampling=spacing_mm)
        near += int((distance_mm[surface] <= tolerance_mm + 1e-6).sum())
    return near / sum(int(surface.sum()) for surface in surfaces)


def evaluate(
    model: Network,
    cases: Sequence[StoredCase],
    classes: Sequence[str] | None = None,
    *,
    tolerance_mm: float = 2.0,
    overlap: float | None = None,
    postprocess: bool = True,
    device: str | torch.device | None = None,
    masks: Path | None = None,
    keep: Sequence[str] = (),
    progress: bool = True,
) -> Scores:
    """Segment prepared scans and compare with their labels, on the grid of the store.

    classes: of the model's, all if not given; in each scan those count that it labels and shows,
    as in the paper. overlap, postprocess, device: see `segment_volume`. masks: a folder that
    receives the masks of the classes `keep`, see `read_masks`.

    Raises:
        UsageError: no scan, or none of the classes is labelled and present in one.
    """
    names = list(model.config.class_names if classes is None else classes)
    rows: list[Score] = []
    for case in tqdm(cases, desc="evaluation", unit="scan", disable=not progress):
        wanted = [name for name in names if name in case.annotated]
        kept = [name for name in keep if name in names]
        hu = case.read_ct()
        if hu is None or not (wanted or kept):
            continue
        with warnings.catch_warnings():
            # A crop without air looks like an MR; the preparation has judged the scan already.
            warnings.simplefilter("ignore", VolumeWarning)
            predicted = segment_volume(
                model,
                (hu.astype(np.float32), np.asarray(case.affine)),
                classes=list(dict.fromkeys([*wanted, *kept])),
                device=device,
                overlap=overlap,
                postprocess=postprocess,
                progress=False,
            )
        rows += _compare(predicted.mask, case, wanted, tolerance_mm)
        if masks is not None:
            _keep_masks(masks, case, kept, predicted.mask)
    if not rows:
        raise UsageError(f"None of the {len(cases)} scans shows any of the classes asked for.")
    return Scores(tuple(rows), tolerance_mm, cases[0].spacing_mm)


def _compare(
    mask_of: Callable[[str], NDArray[np.bool_]],
    case: StoredCase,
    names: Sequence[str],
    tolerance_mm: float,
) -> Iterator[Score]:
    labels = case.read_labels()
    known = ~np.isin(labels, list(case.unknown))
    membership = case.membership(names)
    for column, name in enumerate(names):
        reference = membership[:, column][labels] & known
        mask = mask_of(name) & known
        overlap = dice(mask, reference)
        surface = surface_dice(mask, reference, [case.spacing_mm] * 3, tolerance_mm)
        if overlap is not None and surface is not None:
            yield Score(case.key, name, overlap, surface)


# --- masks that are kept --------------------------------------------------------------------------


def _keep_masks(
    folder: Path,
    case: StoredCase,
    names: Sequence[str],
    mask_of: Callable[[str], NDArray[np.bool_]],
) -> None:
    with replacing(_masks_file(folder, case)) as temporary:
        # Packed one by one: as a byte a voxel, all classes of a large scan would fill the memory.
        bits = {name: pack(mask_of(name)) for name in names}
        np.savez_compressed(temporary, **bits)  # type: ignore[arg-type]


def read_masks(
    folder: Path, case: StoredCase, names: Sequence[str]
) -> dict[str, NDArray[np.bool_]]:
    """Masks (X, Y, Z) of classes that `evaluate` kept of a scan, on its grid; others are left out.

    A mask takes a byte a voxel: ask for few at a time.
    """
    path = _masks_file(folder, case)
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as bits:
        count, kept = case.shape[2], [name for name in names if name in bits.files]
        return {name: unpack(bits[name], count) for name in kept}


def _masks_file(folder: Path, case: StoredCase) -> Path:
    return folder / f"{re.sub('[^A-Za-z0-9._+-]', '_', case.key)}.npz"
