"""The scores of masks: Dice and surface Dice of each class in each scan, with intervals.

Every comparison of a mask with a reference goes through `score_masks`: the validation of a training
run, the measurements before and after a fine-tuning, and the benchmarks.

The surface Dice (NSD) is the share of both surfaces, by area, that lies within a tolerance of the
other surface. Reference: Nikolov et al., 2021 (arXiv 1809.04430), in MONAI's implementation with
subvoxels. A scan without a class gives that class no score, as in the paper.
"""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from foundation.errors import UsageError
from foundation.files import replacing
from foundation.imaging.bits import pack, unpack
from foundation.imaging.frame import bounding_box
from foundation.imaging.volumes import VolumeWarning
from foundation.inference.predict import segment_volume
from foundation.networks.protocol import Network
from foundation.settings import read, read_file

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from foundation.data.store.arrays import StoredCase
    from foundation.inference.options import InferenceOptions

FEWEST_CASES = 3  # for an interval: fewer say nothing of the scatter between scans
DRAWS = 2000
FORMAT_VERSION = 1
Metric = Literal["dice", "nsd"]
Interval = tuple[float, float] | None
Mask = NDArray[np.bool_]


def dice(mask: Mask, reference: Mask) -> float | None:
    """Dice coefficient of two masks.

    Args:
        mask: Any shape, bool.
        reference: Of the same shape.

    Returns:
        In [0, 1]; None where the reference is empty, since overlap then means nothing.
    """
    if not reference.any():
        return None
    return 2 * int((mask & reference).sum()) / (int(mask.sum()) + int(reference.sum()))


def surface_dice(
    mask: Mask, reference: Mask, spacing_mm: Sequence[float], tolerance_mm: float
) -> float | None:
    """Surface Dice of two masks.

    Args:
        mask: (X, Y, Z), bool.
        reference: Of the same shape.
        spacing_mm: Distance between voxel centres along X, Y and Z.
        tolerance_mm: Surface within this distance of the other surface counts as right.

    Returns:
        In [0, 1]; None where the reference is empty.

    Reference: Nikolov et al., 2021 (arXiv 1809.04430).
    """
    from monai.metrics.surface_dice import compute_surface_dice

    if not reference.any():
        return None
    box = bounding_box(mask | reference)
    if box is None or not mask.any():
        return 0.0
    # Distances take time by the voxel, and far from both masks they are not needed. Around the box
    # lies a border of nothing: a mask that ends with the grid has a surface there.
    ours, theirs = [torch.from_numpy(np.pad(m[box], 1))[None, None] for m in (mask, reference)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of MONAI's own inner calls
        found = compute_surface_dice(
            ours,
            theirs,
            [tolerance_mm + 1e-6],
            include_background=True,
            spacing=[float(mm) for mm in spacing_mm],
            use_subvoxels=True,
        )
    return float(found)


@dataclass(frozen=True)
class Score:
    """One class in one scan.

    Attributes:
        case: Key of the scan.
        name: Of the class.
        dice: In [0, 1].
        nsd: Surface Dice, in [0, 1]; None where it was not measured.
    """

    case: str
    name: str
    dice: float
    nsd: float | None = None


@dataclass(frozen=True)
class Scores:
    """Every class in every scan that labels it and where it is present.

    Attributes:
        rows: One for each.
        tolerance_mm: Of the surface Dice.
        spacing_mm: Of the grid on which the masks were compared.
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
        """Arrange the values of a metric as a table.

        Args:
            classes: Its columns.
            metric: "dice" or "nsd".
            cases: Keys of the scans that are its rows; `self.cases` if not given.

        Returns:
            (cases, classes), NaN where a scan does not show a class.
        """
        keys = self.cases if cases is None else cases
        table = np.full((len(keys), len(classes)), np.nan)
        row_of = {key: row for row, key in enumerate(keys)}
        column_of = {name: column for column, name in enumerate(classes)}
        for each in self.rows:
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
                    writer = csv.DictWriter(file, ["case", "name", "dice", "nsd"])
                    writer.writeheader()
                    writer.writerows(asdict(row) for row in self.rows)
        return path

    @classmethod
    def read(cls, path: str | Path) -> Scores:
        """Read what `write` wrote as .json.

        Raises:
            UsageError: The file is missing, damaged, or of another format version.
        """
        return read(cls, read_file(path), str(path), version=FORMAT_VERSION)


def mean_of(table: NDArray[np.float64]) -> float | None:
    """Compute the mean over rows, then over columns, of what is no NaN; None where all is."""
    return _means(table[None])[0]


def bootstrap(
    values: Sequence[float] | NDArray[np.float64], confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Estimate the interval in which the mean lies, by drawing scans anew, with replacement.

    Classes of one scan are drawn together, since they fail together.

    Args:
        values: (N,), or (N, classes) with NaN where a scan does not show a class; then the mean
            over classes of the means over scans is meant.
        confidence: Probability that the interval holds the mean.
        seed: Of the draws.

    Returns:
        Its two ends; None for fewer than three scans, of which it would be made up.
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


def score_masks(
    case: str,
    mask_of: Callable[[str], Mask],
    references: Iterable[tuple[str, Mask]],
    spacing_mm: Sequence[float],
    tolerance_mm: float | None = None,
    known: Mask | None = None,
) -> Iterator[Score]:
    """Compare masks with references, class by class.

    Args:
        case: Key of the scan, for the rows.
        mask_of: Class name → mask (X, Y, Z), bool; called once for each reference.
        references: Pairs of a class name and its mask on the same grid.
        spacing_mm: Distance between voxel centres along X, Y and Z.
        tolerance_mm: Of the surface Dice; it is not computed if not given, which saves time.
        known: (X, Y, Z), bool; voxels outside count for neither side. All count if not given.

    Yields:
        A row for each class that its reference shows.
    """
    for name, reference in references:
        mask = mask_of(name)
        if known is not None:
            mask, reference = mask & known, reference & known
        overlap = dice(mask, reference)
        if overlap is None:
            continue
        nsd = None
        if tolerance_mm is not None:
            nsd = surface_dice(mask, reference, spacing_mm, tolerance_mm)
        yield Score(case, name, overlap, nsd)


# --- a network on prepared scans ------------------------------------------------------------------


def evaluate(
    network: Network,
    cases: Sequence[StoredCase],
    classes: Sequence[str] | None = None,
    *,
    tolerance_mm: float = 2.0,
    masks: Path | None = None,
    keep: Sequence[str] = (),
    **options: Unpack[InferenceOptions],
) -> Scores:
    """Segment prepared scans and compare the masks with their labels, on the grid of the store.

    Args:
        network: A `UniversalModel`, or any network that `segment_volume` takes.
        cases: Scans of a store.
        classes: Only these of the network's; all if not given. A scan counts for the classes that
            it labels and shows.
        tolerance_mm: Of the surface Dice.
        masks: A folder that receives the masks of the classes in `keep`; see `read_masks`.
        keep: Classes whose masks are kept, labelled or not.
        **options: As of `segment_volume`; `progress` is a bar over the scans.

    Returns:
        The scores of each class in each scan.

    Raises:
        UsageError: No scan, or none of the classes is labelled and present in one.
    """
    progress = options.pop("progress", True)
    rows: list[Score] = []
    for case in tqdm(cases, desc="evaluation", unit="scan", disable=None if progress else True):
        rows += score_case(
            network, case, classes, tolerance_mm=tolerance_mm, masks=masks, keep=keep, **options
        )
    if not rows:
        raise UsageError(f"None of the {len(cases)} scans shows any of the classes asked for.")
    return Scores(tuple(rows), tolerance_mm, cases[0].spacing_mm)


def score_case(
    network: Network,
    case: StoredCase,
    classes: Sequence[str] | None = None,
    *,
    tolerance_mm: float | None = None,
    masks: Path | None = None,
    keep: Sequence[str] = (),
    **options: Unpack[InferenceOptions],
) -> list[Score]:
    """Score one prepared scan; the arguments are those of `evaluate`."""
    names = list(network.config.class_names)
    wanted = [n for n in (names if classes is None else classes) if n in case.annotated]
    kept = [name for name in keep if name in names]
    hu = case.read_ct()
    if hu is None or not (wanted or kept):
        return []
    options["progress"] = False
    with warnings.catch_warnings():
        # A crop without air looks like an MR; the preparation has judged the scan already.
        warnings.simplefilter("ignore", VolumeWarning)
        predicted = segment_volume(
            network,
            (hu.astype(np.float32), np.asarray(case.affine)),
            classes=list(dict.fromkeys([*wanted, *kept])),
            **options,
        )
    if masks is not None:
        _keep_masks(masks, case, kept, predicted.mask)
    labels = case.read_labels()
    membership = case.membership(wanted)
    references = ((name, membership[:, i][labels]) for i, name in enumerate(wanted))
    known = ~np.isin(labels, list(case.unknown))
    spacing_mm = [case.spacing_mm] * 3
    return list(score_masks(case.key, predicted.mask, references, spacing_mm, tolerance_mm, known))


def validate(
    network: Network,
    cases: Sequence[StoredCase],
    overlap: float,
    classes: Sequence[str] | None = None,
) -> Tensor:
    """Sum up the Dice values of each class over scans.

    Sums, so that processes can share the scans among them and add up what they found. Masks are
    measured without clean-up.

    Args:
        network: As of `evaluate`; K counts all its classes.
        cases: Scans of a store; there may be none.
        overlap: Of the sliding window, in [0, 1).
        classes: Only these count; all of the network's if not given.

    Returns:
        (2, K) float64: the sum and the number of the values of each class.
    """
    names = network.config.class_names
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    for case in cases:
        for row in score_case(network, case, classes, overlap=overlap, postprocess=False):
            sums[:, names.index(row.name)] += torch.tensor([row.dice, 1.0], dtype=torch.float64)
    return sums


def mean_dice(sums: Tensor, classes: Sequence[str]) -> tuple[dict[str, float], float | None]:
    """Compute mean Dice values from their sums.

    Args:
        sums: (2, K), what `validate` returned, added up over processes.
        classes: The K names.

    Returns:
        The mean of each class that was present, and the mean over those; None without any.
    """
    by_class = {
        name: float(total / count)
        for name, total, count in zip(classes, sums[0], sums[1], strict=True)
        if count > 0
    }
    return by_class, sum(by_class.values()) / len(by_class) if by_class else None


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
    """Read masks that `evaluate` kept.

    A mask takes a byte a voxel: ask for few at a time.

    Args:
        folder: The `masks` of `evaluate`.
        case: The scan.
        names: Of the classes.

    Returns:
        Class name → mask (X, Y, Z) on the grid of the scan; without the classes that were not kept.
    """
    path = _masks_file(folder, case)
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as bits:
        count, kept = case.shape[2], [name for name in names if name in bits.files]
        return {name: unpack(bits[name], count) for name in kept}


def _masks_file(folder: Path, case: StoredCase) -> Path:
    return folder / f"{re.sub('[^A-Za-z0-9._+-]', '_', case.key)}.npz"
