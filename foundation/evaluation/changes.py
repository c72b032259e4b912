"""What a tuning changed: scores of the same scans before and after it, class by class."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foundation.evaluation.intervals import (
    Difference,
    Interval,
    bootstrap,
    mean_of,
    paired_bootstrap,
)
from foundation.evaluation.scores import Metric, Scores

FORGOTTEN = 0.01  # a fall of Dice by more than this is marked
METRICS: tuple[Metric, ...] = ("dice", "nsd")
PARTS = ("before", "after", "low", "high", "change", "change_low", "change_high")
AGREEMENT_PARTS = ("agreement", "agreement_low", "agreement_high")
NONE = (None, None)  # where there is no interval


@dataclass(frozen=True)
class Change:
    """A class, or the mean of several, before and after a tuning.

    Attributes:
        name: The class's, or the heading of the mean.
        scans: How many scans show it.
        before: In [0, 1]; None where it was not measured.
        after: The same, after the tuning.
        interval: Of the value after, over scans.
        change_interval: Of the change, over scans.
    """

    name: str
    scans: int
    before: float | None
    after: float | None
    interval: Interval
    change_interval: Interval

    @property
    def change(self) -> float | None:
        """The value after less that before; None where one was not measured."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def forgotten(self) -> bool:
        """Whether it fell by more than FORGOTTEN."""
        return self.change is not None and self.change < -FORGOTTEN - 1e-9


def change(
    before: Scores, after: Scores, title: str, classes: Sequence[str], metric: Metric = "dice"
) -> Change:
    """Compute the change of the mean over classes.

    Args:
        before: Scores before the tuning.
        after: Scores after it. Scans are drawn in pairs, before with after.
        title: Name of the result.
        classes: The classes that the mean is over.
        metric: "dice" or "nsd".

    Returns:
        The change, with 95 % intervals over scans.
    """
    keys = tuple(dict.fromkeys((*before.cases, *after.cases)))
    first, then = (scores.table(classes, metric, keys) for scores in (before, after))
    return Change(
        title,
        int((~np.isnan(first) | ~np.isnan(then)).any(axis=1).sum()),
        mean_of(first),
        mean_of(then),
        bootstrap(then),
        paired_bootstrap(then, first).interval,
    )


def paired_difference(
    a: Scores, b: Scores, classes: Sequence[str], metric: Metric = "dice"
) -> Difference:
    """Compare two arms on the scans and classes that both have scores of.

    Args:
        a: Scores of one arm.
        b: Scores of the other, of the same scans.
        classes: The classes that the mean is over.
        metric: "dice", "nsd", or another number of `Score`.

    Returns:
        The difference, `a` less `b`, with its interval over scans and the smallest that such a run
        would have found; see `Difference`.
    """
    keys = tuple(dict.fromkeys((*a.cases, *b.cases)))
    return paired_bootstrap(a.table(classes, metric, keys), b.table(classes, metric, keys))


def write_table(
    path: Path,
    before: Scores,
    after: Scores,
    new: Sequence[str],
    old: Sequence[str],
    agreement: Scores,
) -> None:
    """Write a CSV: a line per class, new ones first, and the mean of each group.

    Args:
        path: Of the CSV.
        before: Scores before the tuning.
        after: Scores after it.
        new: The classes that were added.
        old: The classes that the model had before.
        agreement: Of old classes in scans that do not label them. They are the group
            "unlabelled", which has agreement with the model before, and no Dice of its own.
    """
    columns = [f"{metric}_{part}" for metric in METRICS for part in PARTS]
    agreements = [f"{metric}_{part}" for metric in METRICS for part in AGREEMENT_PARTS]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "group", "scans", *columns, "forgotten", *agreements])
        for group, classes in (("new", new), ("old", old)):
            for title, names in with_mean(classes, f"mean of {group} classes"):
                found = [change(before, after, title, names, metric) for metric in METRICS]
                cells: list[object] = [title, group, found[0].scans]
                for each in found:
                    values = (each.before, each.after, *(each.interval or NONE), each.change)
                    cells += _texts(*values, *(each.change_interval or NONE))
                forgotten = "yes" if group == "old" and found[0].forgotten else ""
                writer.writerow([*cells, forgotten, *("" for _ in agreements)])
        for title, names in with_mean(agreement.classes, "mean of unlabelled classes"):
            cells = [title, "unlabelled", len(agreement.by_case(names)), *("" for _ in columns), ""]
            for metric in METRICS:
                interval = agreement.interval(names, metric) or NONE
                cells += _texts(agreement.mean(names, metric), *interval)
            writer.writerow(cells)


def with_mean(
    classes: Sequence[str], mean: str, title: Callable[[str], str] = str, least: int = 1
) -> list[tuple[str, Sequence[str]]]:
    """Arrange a table: a row for each class, and below them one for their mean.

    Args:
        classes: Names of the classes.
        mean: Heading of the mean's row.
        title: Class name → heading of its row.
        least: Fewer classes than this have no row for their mean.

    Returns:
        The heading of each row, and the classes that it is about.
    """
    rows: list[tuple[str, Sequence[str]]] = [(title(name), [name]) for name in classes]
    return [*rows, (mean, classes)] if len(classes) >= least else rows


def _texts(*values: float | None) -> list[str]:
    # Plus nothing: a zero that was rounded from below has no sign.
    return ["" if value is None else f"{round(value, 4) + 0.0:.4f}" for value in values]
