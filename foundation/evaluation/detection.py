"""Tumours found or not, by patient and by lesion.

Patient level: a patient is positive where the reference has a voxel of the class, and is called
positive where any component of the prediction, after post-processing, has at least a given volume.
With the least volume of 0 any predicted voxel is a positive, as in the paper.

Lesion level: a lesion is a component of the reference; voxels that share a corner are connected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from foundation.errors import UsageError
from foundation.evaluation.intervals import Interval, bootstrap, bootstrap_ratio, wilson
from foundation.evaluation.metrics import Mask
from foundation.imaging.frame import bounding_box

Criterion = Literal["iou", "dice", "any", "centre"]
CRITERIA = ("iou", "dice", "any", "centre")
_CORNERS = np.ones((3, 3, 3), int)


@dataclass(frozen=True)
class Finding:
    """What was found of one class in one patient.

    Attributes:
        case: Key of the scan.
        name: Of the class.
        present: Whether the reference shows it.
        score: By which patients are ranked for the AUC; see `find`.
        found: Whether the patient is called positive.
        lesions: Components of the reference.
        found_lesions: Those of them that were found.
        false_positives: Components of the prediction that belong to no lesion that was found.
    """

    case: str
    name: str
    present: bool
    score: float
    found: bool
    lesions: int
    found_lesions: int
    false_positives: int


@dataclass(frozen=True)
class Detection:
    """Findings of one class in many patients, with 95 % intervals.

    Attributes:
        patients: How many.
        positives: Those whose reference shows the class.
        sensitivity: Share of the positives that are called so; None without any.
        sensitivity_interval: By Wilson.
        specificity: Share of the others that are not called positive; None without any.
        specificity_interval: By Wilson.
        auc: Probability that a positive has a higher score than another; None without both.
        auc_interval: By DeLong, on the logit scale; None where the AUC is exactly 0 or 1 or all
            scores are equal, since the method then gives no width, or where a group has fewer than
            two patients.
        lesions: Of all patients.
        lesion_sensitivity: Share of the lesions that were found; None without any.
        lesion_sensitivity_interval: By bootstrap over patients, since lesions of one patient are
            found or missed together.
        false_positives_per_scan: Mean.
        false_positives_interval: By bootstrap over patients.
    """

    patients: int
    positives: int
    sensitivity: float | None
    sensitivity_interval: Interval
    specificity: float | None
    specificity_interval: Interval
    auc: float | None
    auc_interval: Interval
    lesions: int
    lesion_sensitivity: float | None
    lesion_sensitivity_interval: Interval
    false_positives_per_scan: float | None
    false_positives_interval: Interval


def find(
    case: str,
    name: str,
    mask: Mask,
    reference: Mask,
    spacing_mm: Sequence[float],
    *,
    probability: NDArray[np.float32] | None = None,
    minimum_ml: float = 0.0,
    criterion: Criterion = "iou",
    threshold: float = 0.1,
) -> Finding:
    """Compare the prediction of a tumour class with its reference in one patient.

    The score of the patient is the mean probability of the most probable voxels that make up
    `minimum_ml`; with the least volume of 0, the highest probability. So a patient without any
    predicted voxel still has a rank. Without probabilities it is the volume of the largest
    component, ml.

    A lesion is found by `criterion`:

    - "iou", "dice": all components of the prediction that touch the lesion, taken together, reach
      `threshold` in this measure with it.
    - "any": they share a voxel.
    - "centre": the centre of mass of a component of the prediction lies in the lesion.

    Args:
        case: Key of the scan.
        name: Of the class.
        mask: The prediction after post-processing (X, Y, Z), bool.
        reference: Of the same shape.
        spacing_mm: Distance between voxel centres along X, Y and Z.
        probability: Of the class after post-processing (X, Y, Z), in [0, 1], as
            `Segmentation.probabilities` gives it.
        minimum_ml: Smaller components of the prediction are left out.
        criterion: By which a lesion is found.
        threshold: Of "iou" and "dice", in (0, 1].

    Returns:
        The finding.

    Raises:
        UsageError: The shapes differ, or the criterion or the threshold is not allowed.
    """
    _check(mask, reference, probability, criterion, threshold)
    voxel_ml = float(np.prod(np.asarray(spacing_mm, float))) / 1000
    box = bounding_box(mask | reference)  # numbers of components take four bytes a voxel
    if box is not None:
        mask, reference = mask[box], reference[box]
    predicted, sizes = _components(mask)
    kept = np.flatnonzero(sizes * voxel_ml >= max(minimum_ml, voxel_ml) - 1e-9)
    table = np.zeros(len(sizes), np.int32)
    table[kept] = kept
    predicted = table[predicted]
    lesions, lesion_sizes = _components(reference)
    numbers = np.flatnonzero(lesion_sizes)
    # Components that touch each other, as pairs (lesion, component of the prediction).
    shared = _overlaps(lesions, predicted)
    centres = _centres(predicted, kept, lesions) if criterion == "centre" else {}
    right: set[int] = set()
    found = 0
    for lesion in numbers:
        touching = {there: n for (here, there), n in shared.items() if here == lesion}
        if criterion == "centre":
            touching = {c: 1 for c, where in centres.items() if where == lesion}
        if touching and (
            criterion in ("any", "centre")
            or _overlap(
                criterion,
                sum(touching.values()),
                int(lesion_sizes[lesion]),
                int(sizes[list(touching)].sum()),
            )
            >= threshold
        ):
            found += 1
            right |= set(touching)
    if probability is None:
        score = float(sizes[kept].max() * voxel_ml) if len(kept) else 0.0
    else:
        score = _highest(probability, max(1, round(minimum_ml / voxel_ml)))
    return Finding(
        case,
        name,
        present=len(numbers) > 0,
        score=score,
        found=len(kept) > 0,
        lesions=len(numbers),
        found_lesions=found,
        false_positives=len(set(kept.tolist()) - right),
    )


def summarise(findings: Sequence[Finding]) -> Detection:
    """Sum up the findings of one class over patients.

    Args:
        findings: One a patient.

    Returns:
        The summary.

    Raises:
        UsageError: The findings are of several classes, or a patient has two.
    """
    names = sorted({each.name for each in findings})
    if len(names) > 1:
        raise UsageError(f"The findings are of {', '.join(names)}. Sum up one class at a time.")
    if len({each.case for each in findings}) < len(findings):
        raise UsageError("A patient has two findings of one class. Give one for each patient.")
    ill = [each for each in findings if each.present]
    well = [each for each in findings if not each.present]
    hits, quiet = sum(each.found for each in ill), sum(not each.found for each in well)
    lesions = sum(each.lesions for each in findings)
    found = sum(each.found_lesions for each in findings)
    false = [float(each.false_positives) for each in findings]
    area = auc([each.score for each in ill], [each.score for each in well])
    return Detection(
        patients=len(findings),
        positives=len(ill),
        sensitivity=hits / len(ill) if ill else None,
        sensitivity_interval=wilson(hits, len(ill)),
        specificity=quiet / len(well) if well else None,
        specificity_interval=wilson(quiet, len(well)),
        auc=area[0],
        auc_interval=area[1],
        lesions=lesions,
        lesion_sensitivity=found / lesions if lesions else None,
        lesion_sensitivity_interval=bootstrap_ratio(
            [each.found_lesions for each in ill], [each.lesions for each in ill]
        ),
        false_positives_per_scan=float(np.mean(false)) if false else None,
        false_positives_interval=bootstrap(false) if false else None,
    )


def auc(
    positives: Sequence[float], negatives: Sequence[float], confidence: float = 0.95
) -> tuple[float | None, Interval]:
    """Area under the ROC curve, with its interval.

    Args:
        positives: Scores of those who have it.
        negatives: Scores of the others. Equal scores count half.
        confidence: Probability that the interval holds the area.

    Returns:
        The area, None without both groups; and its interval, see `Detection.auc_interval`.

    Reference: DeLong, DeLong and Clarke-Pearson, 1988, Biometrics 44, 837-845.
    """
    a, b = np.asarray(positives, float), np.asarray(negatives, float)
    if not len(a) or not len(b):
        return None, None
    won = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    area = float(won.mean())
    if min(len(a), len(b)) < 2 or area in (0.0, 1.0):
        return area, None
    variance = won.mean(axis=1).var(ddof=1) / len(a) + won.mean(axis=0).var(ddof=1) / len(b)
    if not variance:  # equal scores of all: drawn anew they stay equal, which is no certainty
        return area, None
    z = stats.norm.ppf((1 + confidence) / 2)
    logit, error = np.log(area / (1 - area)), np.sqrt(variance) / (area * (1 - area))
    low, high = 1 / (1 + np.exp(-(logit + np.array([-z, z]) * error)))
    return area, (float(low), float(high))


def _check(
    mask: Mask,
    reference: Mask,
    probability: NDArray[np.float32] | None,
    criterion: str,
    threshold: float,
) -> None:
    shapes = {each.shape for each in (mask, reference, probability) if each is not None}
    if len(shapes) > 1:
        raise UsageError(f"Mask, reference and probability have shapes {sorted(shapes)}.")
    if criterion not in CRITERIA:
        raise UsageError(f"Unknown criterion {criterion!r}. Choose from: {', '.join(CRITERIA)}.")
    if not 0 < threshold <= 1:
        raise UsageError(f"The threshold of a lesion is {threshold:g}; give a share in (0, 1].")


def _components(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The number of each voxel's component, from 1 on; and voxels by number, 0 of none."""
    numbers = np.zeros(mask.shape, np.int32)
    box = bounding_box(mask)
    if box is None:
        return numbers, np.zeros(1, np.int64)
    numbers[box] = ndimage.label(mask[box], _CORNERS)[0]
    sizes = np.bincount(numbers[box].ravel())
    sizes[0] = 0
    return numbers, sizes


def _overlaps(
    lesions: NDArray[np.int32], predicted: NDArray[np.int32]
) -> dict[tuple[int, int], int]:
    """(lesion, component) → voxels that they share."""
    both = (lesions > 0) & (predicted > 0)
    width = int(predicted.max(initial=0)) + 1
    keys, counts = np.unique(
        lesions[both].astype(np.int64) * width + predicted[both], return_counts=True
    )
    return {divmod(int(key), width): int(n) for key, n in zip(keys, counts, strict=True)}


def _centres(
    predicted: NDArray[np.int32], kept: NDArray[np.int64], lesions: NDArray[np.int32]
) -> dict[int, int]:
    """Component of the prediction → the lesion in which its centre lies, 0 for none."""
    found = ndimage.center_of_mass(predicted > 0, predicted, kept) if len(kept) else []
    where = [tuple(np.rint(centre).astype(int)) for centre in found]
    return {int(c): int(lesions[at]) for c, at in zip(kept, where, strict=True)}


def _overlap(criterion: str, shared: int, first: int, second: int) -> float:
    if criterion == "dice":
        return 2 * shared / (first + second)
    return shared / (first + second - shared)


def _highest(probability: NDArray[np.float32], count: int) -> float:
    """The mean of the highest `count` values."""
    values = probability[probability > 0]
    if len(values) > count:
        values = np.partition(values, len(values) - count)[-count:]
    return float(values.sum(dtype=float) / count)
