"""A network on labelled scans: of a store, on its grid; or of a dataset, on each scan's own grid.

Validation, fine-tuning and pretraining measure on a store. What is reported of a model is measured
on the grid of the CT's file, by `evaluate_dataset`, as the paper and the challenges do.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from foundation.data.reference import Reference, sides_of, union_of
from foundation.errors import UsageError, listed
from foundation.evaluation.detection import find
from foundation.evaluation.metrics import Tolerance
from foundation.evaluation.scores import Score, Scores, score_masks
from foundation.files import replacing
from foundation.imaging.bits import pack, unpack
from foundation.imaging.volumes import VolumeWarning
from foundation.inference.predict import resolve_classes, segment_volume
from foundation.networks.protocol import Network

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from foundation.data.cases import Case
    from foundation.data.dataset import Dataset
    from foundation.data.store.arrays import StoredCase
    from foundation.inference.options import InferenceOptions

# --- a network on prepared scans ------------------------------------------------------------------


def evaluate(
    network: Network,
    cases: Sequence[StoredCase],
    classes: Sequence[str] | None = None,
    *,
    tolerance_mm: Tolerance | None = 2.0,
    hd95: bool = False,
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
        tolerance_mm: Of the surface Dice: one, or class name → its own.
        hd95: Also compute the robust Hausdorff distance.
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
            network,
            case,
            classes,
            tolerance_mm=tolerance_mm,
            hd95=hd95,
            masks=masks,
            keep=keep,
            **options,
        )
    scores = Scores(tuple(rows), tolerance_mm, cases[0].spacing_mm if cases else None)
    if not scores.present:
        raise UsageError(f"None of the {len(cases)} scans shows any of the classes asked for.")
    return scores


def score_case(
    network: Network,
    case: StoredCase,
    classes: Sequence[str] | None = None,
    *,
    tolerance_mm: Tolerance | None = None,
    hd95: bool = False,
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
    return list(
        score_masks(case.key, predicted.mask, references, spacing_mm, tolerance_mm, known, hd95)
    )


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
            if row.dice is not None:
                value = torch.tensor([row.dice, 1.0], dtype=torch.float64)
                sums[:, names.index(row.name)] += value
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


# --- a network on the scans of a dataset ----------------------------------------------------------


def evaluate_dataset(
    network: Network,
    dataset: Dataset,
    root: str | Path,
    *,
    cases: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    tolerance_mm: Tolerance | None = 2.0,
    hd95: bool = False,
    findings: Sequence[str] = (),
    **options: Unpack[InferenceOptions],
) -> Scores:
    """Segment scans of a dataset and compare the masks with its labels, on each scan's own grid.

    Args:
        network: A `UniversalModel`, or any network that `segment_volume` takes.
        dataset: How the scans are found and read, e.g. `get_dataset("06")`.
        root: The folder that holds the dataset.
        cases: Ids of the scans to take, such as a test split; all if not given.
        classes: Names or aliases; all of the network's if not given. A scan counts for the classes
            that it labels.
        tolerance_mm: Of the surface Dice: one, or class name → its own.
        hd95: Also compute the robust Hausdorff distance.
        findings: Tumour classes whose `Scores.findings` are made, with the defaults of `find`.
        **options: As of `segment_volume`; `progress` is a bar over the scans.

    Returns:
        The scores of each class in each scan. Where the labels merge the sides of a pair, the row
        has the pair's name ("kidney"), and the mask is the union of both sides.

    Raises:
        UsageError: An unknown class or scan, no scan, or none that shows any of the classes.
        VolumeError: A scan cannot be read.
    """
    chosen = _chosen(dataset, Path(root), cases)
    progress = options.pop("progress", True)
    bar = tqdm(chosen, desc=dataset.name, unit="scan", disable=None if progress else True)
    scores = Scores.joined(
        score_scan(
            network,
            dataset,
            case,
            classes=classes,
            tolerance_mm=tolerance_mm,
            hd95=hd95,
            findings=findings,
            **options,
        )
        for case in bar
    )
    if not scores.present:
        raise UsageError(f"None of the {len(chosen)} scans shows any of the classes asked for.")
    return scores


def score_dataset(
    network: Network,
    dataset: Dataset,
    root: str | Path,
    *,
    cases: Sequence[str] | None = None,
    **settings: Any,
) -> Iterator[tuple[str, Scores]]:
    """Score the scans of a dataset one after the other, for callers that keep what is done.

    A caller that writes the scores of each scan, and gives only the ids that are left, goes on
    where it was stopped. `Scores.joined` puts them together.

    Args:
        network: As of `evaluate_dataset`.
        dataset: As of `evaluate_dataset`.
        root: The folder that holds the dataset.
        cases: Ids of the scans to take; all if not given.
        **settings: As of `score_scan`.

    Yields:
        The id of a scan, and its scores.

    Raises:
        UsageError: An unknown class or scan.
        VolumeError: A scan cannot be read.
    """
    for case in _chosen(dataset, Path(root), cases):
        yield case.id, score_scan(network, dataset, case, **settings)


def score_scan(
    network: Network,
    dataset: Dataset,
    case: Case,
    *,
    classes: Sequence[str] | None = None,
    tolerance_mm: Tolerance | None = 2.0,
    hd95: bool = False,
    findings: Sequence[str] = (),
    **options: Unpack[InferenceOptions],
) -> Scores:
    """Score one scan on its own grid; the arguments are those of `evaluate_dataset`.

    Args:
        network: As of `evaluate_dataset`.
        dataset: As of `evaluate_dataset`.
        case: One that `dataset.find` gave, with a CT.
        classes: As of `evaluate_dataset`.
        tolerance_mm: As of `evaluate_dataset`.
        hd95: As of `evaluate_dataset`.
        findings: As of `evaluate_dataset`.
        **options: As of `segment_volume`; no bar is drawn.

    Returns:
        Its scores, without rows where it labels none of the classes.

    Raises:
        UsageError: An unknown class, or the case has no CT.
        VolumeError: The scan cannot be read.
    """
    names = resolve_classes(classes, network.config.class_names)
    scan = dataset.read(case)
    if scan.ct is None:
        raise UsageError(f"{case.id} of {dataset.name} has labels and no CT to segment.")
    sources = {label for each in scan.names for label in each}
    label_map = dataset.classes_of([*sources, *map(str, dataset.label_map)])
    reference = Reference.of(scan, label_map, case.annotated, set(map(str, case.unknown)))
    measured = {name: sides_of(name, names) for name in reference.classes}
    measured = {name: parts for name, parts in measured.items() if parts}
    if not measured:
        return Scores((), tolerance_mm)
    options["progress"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VolumeWarning)  # the dataset has judged the scan already
        predicted = segment_volume(
            network,
            (scan.ct, scan.affine),
            classes=[part for parts in measured.values() for part in parts],
            **options,
        )
    rows = score_masks(
        f"{dataset.id}/{case.id}",
        lambda name: union_of(predicted.mask, measured[name]),
        ((name, reference.mask(name)) for name in measured),
        reference.spacing_mm,
        tolerance_mm,
        reference.known,
        hd95,
    )
    wanted = resolve_classes(findings, network.config.class_names) if findings else []
    found = tuple(
        find(
            f"{dataset.id}/{case.id}",
            name,
            _of_known(predicted.mask(name), reference),
            _of_known(reference.mask(name), reference),
            reference.spacing_mm,
            probability=_of_known(predicted.probabilities(name), reference),
        )
        for name in wanted
        if measured.get(name) == (name,)
    )
    return Scores(tuple(rows), tolerance_mm, findings=found)


def _chosen(dataset: Dataset, root: Path, ids: Sequence[str] | None) -> list[Case]:
    there = dataset.find(root)
    if ids is None:
        return there
    by_id = {case.id: case for case in there}
    if lost := [each for each in ids if each not in by_id]:
        raise UsageError(
            f"{dataset.name} in {root} has no scan {listed(lost)}. It has: {listed([*by_id])}."
        )
    return [by_id[each] for each in dict.fromkeys(ids)]


def _of_known(values: NDArray[Any], reference: Reference) -> NDArray[Any]:
    """A mask or probabilities, without what lies where nothing is known."""
    return values if reference.known is None else values * reference.known


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
