"""The pictures of a report: curves and changes as SVG, scans with outlines as PNG."""

from __future__ import annotations

import base64
import colorsys
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from foundation.data.store.arrays import StoredCase
from foundation.imaging.legend import display_name
from foundation.imaging.preview import (
    HU_WINDOW,
    PLANES,
    areas_of,
    arrange,
    informative_slices,
    plane_of,
)

BEFORE, AFTER, BAD = "#9aa5b1", "#1f6feb", "#c62828"
_LINES = ("#1f6feb", "#e07b00", "#2e7d32", "#8e44ad", "#6d4c41", "#00838f")
_MOST_IN_LEGEND = 12


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        label: Its name in the legend.
        points: (x, y) of each.
    """

    label: str
    points: tuple[tuple[float, float], ...]


def curves_svg(curves: Sequence[Curve], x_label: str, y_label: str, counts: bool = False) -> str:
    """Draw lines with their points.

    Args:
        curves: The lines.
        x_label: Text below.
        y_label: Text at the left.
        counts: The x are few whole numbers, each of which is marked, on a logarithmic axis.

    Returns:
        An <svg> element.
    """
    figure = Figure(figsize=(7.2, 3.2))
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        x, y = zip(*sorted(curve.points), strict=True)
        axes.plot(
            x, y, marker="o", markersize=4, color=_LINES[number % len(_LINES)], label=curve.label
        )
    if counts:
        axes.set_xscale("log")
        ticks = sorted({x for curve in curves for x, _ in curve.points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(0, max(1.0, *(y for curve in curves for _, y in curve.points)) * 1.03)
    axes.grid(alpha=0.25)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return _svg(figure)


def changes_svg(changes: Mapping[str, tuple[float, float]], bad: Sequence[str]) -> str:
    """Draw a line per class from its Dice before to that after.

    Args:
        changes: Class name → Dice before and after, in [0, 1].
        bad: The classes that are drawn in red.

    Returns:
        An <svg> element.
    """
    names = list(changes)[::-1]
    figure = Figure(figsize=(7.2, 0.5 + 0.26 * len(names)))
    axes = figure.add_subplot()
    for row, name in enumerate(names):
        before, after = changes[name]
        shade = BAD if name in bad else AFTER
        axes.plot([before, after], [row, row], color=shade, linewidth=2, zorder=1)
        axes.scatter([before], [row], color=BEFORE, s=30, zorder=2)
        axes.scatter([after], [row], color=shade, s=30, zorder=3)
    axes.set_yticks(range(len(names)), [display_name(name) for name in names])
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel("Dice: grey before, coloured after")
    axes.grid(axis="x", alpha=0.25)
    return _svg(figure)


def case_png(
    case: StoredCase,
    masks: Mapping[str, NDArray[np.bool_]],
    references: Mapping[str, NDArray[np.bool_]],
) -> str:
    """Draw three planes of a scan, with references outlined in white and masks in colour.

    The slices are those that show most of the references. The patient's right is at the left.

    Args:
        case: The scan.
        masks: Class name → mask (X, Y, Z) on the grid of the scan.
        references: Class name → mask; the same classes.

    Returns:
        A PNG as a data URI.
    """
    hu = case.read_ct()
    assert hu is not None  # what was measured has a scan
    shown = [name for name in references if references[name].any() or masks[name].any()]
    seen = (references[name] if references[name].any() else masks[name] for name in shown)
    indices = informative_slices(map(areas_of, seen), case.shape)
    sizes = [(case.shape[across], case.shape[down]) for _, _, across, down in PLANES]
    width, height, places = arrange([across / down for across, down in sizes], 10.5)
    low, high = _window(hu, references.values())
    shades = dict(zip(shown, _shades(len(shown)), strict=True))
    handles = [Line2D([], [], color="white", linewidth=2.2, label="reference")]
    handles += [
        Line2D([], [], color=shades[name], linewidth=2, label=display_name(name))
        for name in shown[:_MOST_IN_LEGEND]
    ]
    columns = round(7 * width / 10.5)
    below = 0.25 + 0.2 * -(-len(handles) // columns)
    figure = Figure(figsize=(width, height + below), facecolor="black")
    bottom = below / (height + below)
    grid = figure.add_gridspec(**places, left=0, right=1, bottom=bottom, top=1)
    for place, plane in enumerate(PLANES):
        axes = figure.add_subplot(grid[place])
        axes.set_axis_off()
        axes.imshow(plane_of(hu, plane, indices), cmap="gray", vmin=low, vmax=high)
        for name in shown:
            _outline(axes, plane_of(references[name], plane, indices), "white", 2.2)
            _outline(axes, plane_of(masks[name], plane, indices), shades[name], 1.3)
    figure.legend(
        handles=handles,
        loc="lower center",
        ncol=columns,
        fontsize=8,
        frameon=False,
        labelcolor="white",
    )
    return _png(figure)


def _outline(axes: Any, mask: NDArray[np.bool_], shade: str, width: float) -> None:
    if mask.any():
        padded = np.pad(mask, 1).astype(float)
        across, down = np.arange(padded.shape[1]) - 1, np.arange(padded.shape[0]) - 1
        axes.contour(across, down, padded, levels=[0.5], colors=[shade], linewidths=width)


def _shades(count: int) -> list[str]:
    """Colours that differ from their neighbours, however many: steps of the golden ratio."""
    hues = [(0.33 + 0.618034 * number) % 1 for number in range(count)]
    found = [colorsys.hsv_to_rgb(hue, 0.75, 1.0) for hue in hues]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in rgb) for rgb in found]


def _window(hu: NDArray[np.int16], references: Iterable[NDArray[np.bool_]]) -> tuple[float, float]:
    """HU from black to white: of soft tissue, or wider where bones are outlined."""
    brightest = [float(np.percentile(hu[mask], 75)) for mask in references if mask.any()]
    return HU_WINDOW[0], max(HU_WINDOW[1], 1.5 * max(brightest, default=0.0))


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element without a file's head, which links to a schema."""
    FigureCanvasAgg(figure)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", metadata=nothing
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r"font: [^;\"]*DejaVu[^;\"]*", lambda found: found[0].split(" '")[0], text)


def _png(figure: Figure) -> str:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, facecolor=figure.get_facecolor())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
