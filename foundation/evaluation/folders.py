"""Anyone's masks against anyone's labels: cases are matched by name, classes by what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foundation.data.masks import Labelled, find_labelled, own_name
from foundation.data.naming import known_classes
from foundation.data.reference import sides_of, union_of
from foundation.errors import UniversalCTError, UsageError, listed
from foundation.evaluation.metrics import DEFAULT, Mask, Tolerance
from foundation.evaluation.scores import Score, Scores, score_masks
from foundation.settings import did_you_mean, read_file
from foundation.taxonomy import NAMES, PAIRED, in_order, pair_of


@dataclass(frozen=True)
class Matched:
    """Cases of predictions and of references.

    Attributes:
        pairs: Prediction and reference of each case.
        without_prediction: Names of the references that have none.
        without_reference: Names of the predictions that have none.
    """

    pairs: tuple[tuple[Labelled, Labelled], ...]
    without_prediction: tuple[str, ...]
    without_reference: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class that any reference labels, in the paper's order."""
        return tuple(in_order({name for _, truth in self.pairs for name in truth.classes}))


def match(prediction: Path, reference: Path, names: Path | None = None) -> Matched:
    """Find the cases of two paths, and pair those of one name.

    A single case on each side is a pair, whatever the names.

    Args:
        prediction: A file or a folder, see `foundation.data.masks`.
        reference: Of either kind.
        names: A table of the names of label maps' values, on both sides.

    Returns:
        The pairs, and the cases that have no other.

    Raises:
        UsageError: A path holds nothing that can be read, or no case is on both sides.
    """
    ours, theirs = find_labelled(prediction, names), find_labelled(reference, names)
    if len(ours) == len(theirs) == 1:
        (our,), (their,) = ours.values(), theirs.values()
        return Matched(((our, their),), (), ())
    both = [name for name in theirs if name in ours]
    if not both:
        raise UsageError(
            f"No case is in both: {prediction} has {listed([*ours], 4)}; {reference} has "
            f"{listed([*theirs], 4)}. Name the files or folders alike."
        )
    return Matched(
        tuple((ours[name], theirs[name]) for name in both),
        tuple(name for name in theirs if name not in ours),
        tuple(name for name in ours if name not in theirs),
    )


def score_pair(
    prediction: Labelled,
    truth: Labelled,
    classes: Sequence[str] | None = None,
    *,
    tolerance_mm: Tolerance | None = 2.0,
    hd95: bool = True,
) -> list[Score]:
    """Compare the masks of one case with its reference, on the grid of the reference.

    Args:
        prediction: The masks.
        truth: The reference.
        classes: Only these, as `Matched.classes` has them; all that the reference labels if not
            given.
        tolerance_mm: Of the surface Dice; None, not computed.
        hd95: Also compute the robust Hausdorff distance.

    Returns:
        A row for each class. A class that no label of the prediction stands for has the status "no
        prediction"; a part of a class whose whole is compared, such as a lobe of a lung, is then
        left out.

    Raises:
        VolumeError: A file cannot be read, or the two are on different grids.
    """
    available = prediction.classes
    names = [name for name in truth.classes if classes is None or name in classes]
    predicted = {name: sides_of(name, available) for name in names}
    wholes = truth.wholes
    names = [n for n in names if predicted[n] or not sides_of(wholes.get(n, ""), available)]
    reference = truth.read(names)
    parts = {part for name in names for part in predicted[name]}
    masks = prediction.read(parts, like=reference) if parts else None

    def mask_of(name: str) -> Mask | None:
        return union_of(masks.mask, predicted[name]) if masks and predicted[name] else None

    return list(
        score_masks(
            truth.case,
            mask_of,
            ((name, reference.mask(name)) for name in names),
            reference.spacing_mm,
            tolerance_mm,
            reference.known,
            hd95,
        )
    )


def score_pairs(
    matched: Matched,
    classes: Sequence[str] | None = None,
    *,
    tolerance_mm: Tolerance | None = 2.0,
    hd95: bool = True,
) -> Iterator[tuple[str, list[Score] | UniversalCTError]]:
    """Compare case by case; a broken file must not cost the other cases.

    Args:
        matched: What `match` found.
        classes: As of `score_pair`.
        tolerance_mm: As of `score_pair`.
        hd95: As of `score_pair`.

    Yields:
        Name of the case, and its rows or what is wrong with it.

    Raises:
        UsageError: The request is wrong for every case.
    """
    for prediction, truth in matched.pairs:
        try:
            rows = score_pair(prediction, truth, classes, tolerance_mm=tolerance_mm, hd95=hd95)
            yield truth.case, rows
        except UsageError:
            raise
        except UniversalCTError as error:
            yield truth.case, error


def evaluate_masks(
    prediction: str | Path,
    reference: str | Path,
    *,
    names: str | Path | None = None,
    classes: Sequence[str] | None = None,
    tolerance_mm: Tolerance | None = 2.0,
    hd95: bool = True,
) -> Scores:
    """Compare masks in files with labels in files, as `universal-ct evaluate` does.

    Args:
        prediction: A label map, a folder of masks, or a folder of cases of either kind.
        reference: Of either kind.
        names: A table of the names of label maps' values, on both sides.
        classes: Names or aliases of the classes to compare; all that the references label if not
            given.
        tolerance_mm: Of the surface Dice: one, or class name → its own; None, not computed.
        hd95: Also compute the robust Hausdorff distance.

    Returns:
        The scores of the cases that are on both sides.

    Raises:
        UsageError: A path holds nothing to compare, no case is in both, or an unknown class.
        VolumeError: A file cannot be read, or a prediction is on another grid than its reference.
    """
    matched = match(Path(prediction), Path(reference), Path(names) if names else None)
    wanted = None if classes is None else chosen_classes(classes, matched.classes)
    rows: list[Score] = []
    for ours, theirs in matched.pairs:
        rows += score_pair(ours, theirs, wanted, tolerance_mm=tolerance_mm, hd95=hd95)
    return Scores(tuple(rows), tolerance_mm)


def chosen_classes(given: Iterable[str], there: Sequence[str]) -> list[str]:
    """Find the wanted classes among those that references label.

    Args:
        given: Names or aliases, of the 32 classes or of any others.
        there: As `Matched.classes`.

    Returns:
        Those of `there` that are meant.

    Raises:
        UsageError: No reference labels a class of that name.
    """
    found: list[str] = []
    for name in given:
        meant = [each for each in _meant(name) if each in there]
        if not meant:
            near = did_you_mean(name, there, most=3)
            raise UsageError(
                f"No reference labels the class {name!r}.{near} They label: {listed(there, 40)}."
            )
        found += meant
    return [name for name in there if name in found]


def read_tolerance(text: str) -> Tolerance:
    """Read a tolerance as it is given on the command line.

    Args:
        text: Millimetres, or a YAML file with class → millimetres and "default" for all others.

    Returns:
        The tolerance.

    Raises:
        UsageError: It is neither, or no number from 0 on.
    """
    try:
        return _millimetres(float(text), text)
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
    if not Path(text).is_file():
        raise UsageError(f"The tolerance {text!r} is neither millimetres nor a YAML file.")
    content = read_file(text)
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{text} holds no tolerances: write {{liver: 2.0, {DEFAULT}: 3.0}}.")
    table: dict[str, float] = {}
    for key, value in content.items():
        for name in (DEFAULT,) if key == DEFAULT else _meant(str(key)):
            table[name] = _millimetres(value, f"{text}: {key}")
    return table


def _millimetres(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
        raise UsageError(f"{where}: {value!r} is no tolerance; give millimetres from 0 on.")
    return float(value)


def _meant(name: str) -> list[str]:
    """Every name of a class that a text may mean."""
    known = known_classes(name, NAMES)
    pairs = [pair for pair, both in PAIRED.items() if known == both or pair_of(name) == both]
    return [*dict.fromkeys([*known, *pairs, own_name(name)])]
