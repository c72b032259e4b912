"""Pictures of results as PNG: bars, curves and matrices; every single value is a dot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from numpy.typing import ArrayLike

from foundation import replacing
from foundation.evaluation import Record

COLOURS = ("#2f6db3", "#d9822b", "#3a9d5d", "#a34a9c", "#b8423a", "#6b6b6b", "#8c6d31", "#17a2b8")
Points = Sequence[tuple[float, float]]


@contextmanager
def canvas(path: Path, width: float = 7.0, height: float = 4.0) -> Iterator[Canvas]:
    """Open a picture; the file appears whole when the block ends.

    Args:
        path: A PNG file.
        width, height: In inches, at 120 dots each.
    """
    drawn = Canvas(figsize=(width, height), layout="constrained")
    yield drawn
    with replacing(path) as temporary:
        drawn.savefig(temporary, format="png", dpi=120)


def by_seed(
    records: Sequence[Record], figure: str, arm: Mapping[str, str | int | float]
) -> list[float]:
    """Collect a figure's values over the seeds of an arm.

    Args:
        records: Of an experiment.
        figure: E.g. "dice/mean".
        arm: Records with these values.
    """
    same = [r for r in records if arm.items() <= dict(r.arm).items()]
    found = [f.value for r in same for f in r.figures if f.name == figure]
    return [value for value in found if value is not None]


def by_name(
    records: Sequence[Record],
    names: Iterable[str],
    metrics: Sequence[str],
    arm: Mapping[str, Any],
) -> dict[str, dict[str, list[float]]]:
    """Group the figures of an arm as `bars` takes them: a group for each name, a bar a metric.

    Args:
        records: To look in.
        names: Such as classes.
        metrics: Such as "dice".
        arm: As of `by_seed`.
    """
    return {
        name: {metric: by_seed(records, f"{metric}/{name}", arm) for metric in metrics}
        for name in names
    }


def bars(
    path: Path,
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    label: str,
    title: str = "",
    limits: tuple[float, float] | None = (0, 1),
) -> Path:
    """Draw grouped bars: the mean of each entry, with its single values as dots.

    Args:
        path: A PNG file.
        groups: Along the axis → colour → values, e.g. one a seed.
        label: Of the vertical axis.
        title: Above the picture.
        limits: Of the vertical axis.
    """
    colours = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(1, len(colours))
    width_in = max(5.0, 0.5 * len(groups) * max(1, len(colours)) ** 0.5 + 3)
    with canvas(path, min(18.0, width_in)) as drawn:
        axes = drawn.add_subplot()
        for number, name in enumerate(colours):
            for place, group in enumerate(groups.values()):
                values = [v for v in group.get(name, ()) if v is not None]
                if not values:
                    continue
                x = place + (number - (len(colours) - 1) / 2) * width
                shade = COLOURS[number % len(COLOURS)]
                first = (
                    name
                    if place == next(i for i, g in enumerate(groups.values()) if g.get(name))
                    else None
                )
                axes.bar(x, float(np.mean(values)), width * 0.9, color=shade, label=first)
                axes.plot([x] * len(values), values, ".", color="black", markersize=3)
        axes.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
        axes.set_ylabel(label)
        if limits:
            axes.set_ylim(*limits)
        _finish(axes, title, len(colours) > 1)
    return path


def curves(
    path: Path,
    lines: Mapping[str, Mapping[float, Sequence[float]]],
    x_label: str,
    y_label: str,
    title: str = "",
    logarithmic: bool = False,
) -> Path:
    """Draw lines through means, with single values as dots.

    Args:
        path: A PNG file.
        lines: Name → place on the horizontal axis → values, e.g. one a seed.
        x_label, y_label: Of the axes.
        title: Above the picture.
        logarithmic: Whether the horizontal axis is.
    """
    with canvas(path) as drawn:
        axes = drawn.add_subplot()
        for number, (name, points) in enumerate(lines.items()):
            shade = COLOURS[number % len(COLOURS)]
            xs = [x for x, values in sorted(points.items()) if len(values)]
            axes.plot(xs, [float(np.mean(points[x])) for x in xs], "-", color=shade, label=name)
            for x in xs:
                axes.plot([x] * len(points[x]), list(points[x]), ".", color=shade, markersize=4)
        if logarithmic:
            axes.set_xscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _finish(axes, title, True)
    return path


def matrices(
    path: Path,
    named: Mapping[str, ArrayLike],
    labels: Sequence[str],
    span: tuple[float, float],
    columns: int = 4,
) -> Path:
    """Draw square matrices beside and below each other, in one range of colours.

    Args:
        path: A PNG file.
        named: Title → (N, N).
        labels: Of the N rows and columns.
        span: Values at both ends of the colours.
        columns: Matrices in a row.
    """
    columns = min(columns, len(named))
    rows = -(-len(named) // columns)
    with canvas(path, 5.2 * columns + 1.2, 5.6 * rows) as drawn:
        places: Any = drawn.subplots(rows, columns, squeeze=False).ravel()
        shown = None
        for axes in places[len(named) :]:
            axes.set_axis_off()
        for axes, (title, matrix) in zip(places, named.items(), strict=False):
            shown = axes.imshow(np.asarray(matrix), vmin=span[0], vmax=span[1], cmap="RdBu_r")
            axes.set_title(title, fontsize=9)
            axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=5)
            axes.set_yticks(range(len(labels)), labels, fontsize=5)
        if shown is not None:
            drawn.colorbar(shown, ax=list(places), shrink=0.8)
    return path


def scatter(
    path: Path,
    panels: Mapping[str, tuple[ArrayLike, Sequence[str]]],
    colours: Mapping[str, str],
    title: str = "",
) -> Path:
    """Draw points beside each other, coloured by what they are; axes have no meaning.

    Args:
        path: A PNG file.
        panels: Title → places (N, 2) and what each point is.
        colours: What a point can be → its colour; in the legend by this order.
        title: Above the picture.
    """
    with canvas(path, 5.0 * len(panels) + 2.4, 5.4) as drawn:
        every: Any = drawn.subplots(1, len(panels), squeeze=False)[0]
        for axes, (name, (places, kinds)) in zip(every, panels.items(), strict=True):
            places, kinds = np.asarray(places), np.asarray(kinds)
            for kind, colour in colours.items():
                chosen = places[kinds == kind]
                axes.plot(*chosen.T, ".", color=colour, markersize=3, label=kind)
            axes.set_title(name, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
        handles, names = every[0].get_legend_handles_labels()
        drawn.legend(handles, names, loc="outside right center", fontsize=6, markerscale=3)
        drawn.suptitle(title, fontsize=10)
    return path


def _finish(axes: Any, title: str, legend: bool) -> None:
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    if legend:
        axes.legend(frameon=False, fontsize=8)
