"""A picture of a CT with its masks: axial, coronal and sagittal, as a radiologist looks at them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from foundation.errors import UsageError
from foundation.files import replacing
from foundation.imaging.frame import Box, Frame, bounding_box
from foundation.imaging.legend import colours, display_name
from foundation.imaging.volumes import Volume

if TYPE_CHECKING:
    from foundation.imaging.result import Segmentation

Plane = tuple[str, int, int, int]
Part = tuple[Box, NDArray[np.bool_]]  # where a mask lies, and the mask there

HU_WINDOW = (-160.0, 240.0)  # soft tissue
OPACITY = 0.45
WIDTH_INCHES = 14.0
DPI = 110
LEGEND_COLUMNS = 5
LEGEND_ROW_INCHES = 0.26
STRIP_INCHES = 2.5  # panels that would be lower, side by side, are put below each other

# Axis that a plane cuts, and the RAS axes that run along its rows (across) and columns (down).
# Both are shown reversed: the patient's right at the left, front and head at the top.
PLANES: tuple[Plane, ...] = (("axial", 2, 0, 1), ("coronal", 1, 0, 2), ("sagittal", 0, 1, 2))


def save_preview(
    ct: Volume, masks: Segmentation | Mapping[str, NDArray[Any]], path: str | os.PathLike[str]
) -> Path:
    """Write a PNG of three slices of a CT with coloured masks and a legend of volumes in ml.

    The slices are those that show most of the structures. Voxels keep their true proportions. The
    patient's right is at the left of the picture, as in radiology.

    Args:
        ct: The CT.
        masks: A `Segmentation`, or name → mask (X, Y, Z) on the axes of the CT's file.
        path: A name that ends in .png.

    Returns:
        The path.

    Raises:
        UsageError: A mask of another shape than the CT, or a name that does not end in .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UsageError(f"Cannot write the preview to {path}: name it .png.")
    shades = colours(masks) if isinstance(masks, Mapping) else masks.colours
    frame = Frame.of(ct, ct.spacing_mm)
    # Masks are unpacked one at a time, twice: all of them would take as much as many CTs.
    profiles = {name: _profile(part, frame, ct.shape) for name, part in _parts(masks, ct.shape)}
    voxels = {name: int(profile[0].sum()) for name, profile in profiles.items()}
    indices = informative_slices(profiles.values(), frame.ras_shape)
    panels = [_panel(ct, frame, plane, indices) for plane in PLANES]
    shown: dict[str, list[NDArray[np.bool_]]] = {
        name: [_slice_of_mask(part, frame, plane, indices, ct.shape) for plane in PLANES]
        for name, part in _parts(masks, ct.shape)
    }
    overlays = [np.zeros((*panel.image.shape, 4), np.float32) for panel in panels]
    # Large structures first, so that small ones are drawn over them.
    for name in sorted(shown, key=lambda name: -voxels[name]):
        for inside, overlay in zip(shown[name], overlays, strict=True):
            overlay[inside] = (*(part / 255 for part in shades[name]), OPACITY)
    legend = [
        (f"{display_name(name)}  {voxels[name] * ct.voxel_ml:,.1f} ml", shades[name])
        for name in voxels
    ]
    figure = _draw(panels, overlays, legend, str(ct.path.name) if ct.path else "")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, facecolor=figure.get_facecolor())
    return path


def informative_slices(
    profiles: Iterable[Sequence[NDArray[Any]]], shape: tuple[int, ...]
) -> tuple[int, int, int]:
    """Find the slice along each axis that shows most of the structures.

    Each structure counts by how near the slice comes to its own largest section, so that small ones
    count as much.

    Args:
        profiles: For each structure, its voxels in every slice along X, Y, Z; see `areas_of`.
        shape: Of the volume.

    Returns:
        Indices along X, Y, Z; the middle if there are no structures.
    """
    scores = [np.zeros(size) for size in shape]
    for structure in profiles:
        for score, areas in zip(scores, structure, strict=True):
            score += areas / max(1, areas.max())
    x, y, z = (int(s.argmax()) if s.any() else s.size // 2 for s in scores)
    return x, y, z


def plane_of(ras: NDArray[Any], plane: Plane, indices: Sequence[int]) -> NDArray[Any]:
    """Cut a plane out of a volume, as radiologists look at it.

    Args:
        ras: The volume (X, Y, Z), RAS.
        plane: One of `PLANES`.
        indices: Of the slices along X, Y, Z.

    Returns:
        Rows (downwards) and columns (to the right) of a picture.
    """
    return np.asarray(ras.take(indices[plane[1]], axis=plane[1])[::-1, ::-1].T)


def areas_of(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], ...]:
    """Count the voxels of a mask (X, Y, Z) in every slice along X, along Y, and along Z."""
    columns = mask.sum(axis=2, dtype=np.int64)
    along_z = mask.sum(axis=0, dtype=np.int32).sum(axis=0, dtype=np.int64)
    return columns.sum(axis=1), columns.sum(axis=0), along_z


def arrange(widths: Sequence[float], width_inches: float) -> tuple[float, float, dict[str, Any]]:
    """Place panels side by side, or below each other where they would be strips, as of a slab.

    Args:
        widths: Of each panel, where its height is 1.
        width_inches: Of the figure with panels side by side; half of it with panels in a column.

    Returns:
        Width and height of all in inches, and what `add_gridspec` needs.
    """
    height = width_inches / sum(widths)
    if height >= STRIP_INCHES:
        grid = {"nrows": 1, "ncols": len(widths), "width_ratios": widths, "wspace": 0.02}
        return width_inches, min(9.0, height), grid
    width = width_inches / 2
    heights = [min(width / each, 1.5 * width) for each in widths]
    grid = {"nrows": len(widths), "ncols": 1, "height_ratios": heights, "hspace": 0.25}
    return width, sum(heights) + 0.25 * len(widths), grid


@dataclass(frozen=True)
class _Panel:
    title: str
    image: NDArray[np.float32]
    aspect: float
    width_mm: float
    height_mm: float
    left_mark: str
    right_mark: str


def _parts(
    masks: Segmentation | Mapping[str, NDArray[Any]], shape: tuple[int, ...]
) -> Iterator[tuple[str, Part]]:
    """Each structure that is there: its name, the box around it, and its mask in that box."""
    if not isinstance(masks, Mapping):
        for name in masks.present:
            yield name, masks.boxed(name)
        return
    for name, given in masks.items():
        mask = np.asarray(given, bool)
        if mask.shape != shape:
            raise UsageError(f"Mask {name!r} has shape {mask.shape}; the CT has {shape}.")
        box = bounding_box(mask)
        if box is not None:
            yield name, (box, mask[box])


def _profile(
    part: Part, frame: Frame, shape: tuple[int, int, int]
) -> tuple[NDArray[np.int64], ...]:
    """The voxels of a structure in every slice of the CT along the axes of RAS."""
    box, mask = part
    full = [np.zeros(size, np.int64) for size in shape]
    for areas, reach, found in zip(full, box, areas_of(mask), strict=True):
        areas[reach] = found
    turned = zip(frame.axes, frame.flips, strict=True)
    return tuple(full[axis][::-1] if flip else full[axis] for axis, flip in turned)


def _cut(frame: Frame, plane: Plane, indices: Sequence[int]) -> tuple[int, int]:
    """The file's axis that a plane cuts, and the index of the slice along it."""
    ras_axis = plane[1]
    axis, index = frame.axes[ras_axis], indices[ras_axis]
    return axis, frame.ras_shape[ras_axis] - 1 - index if frame.flips[ras_axis] else index


def _slice_of_mask(
    part: Part, frame: Frame, plane: Plane, indices: Sequence[int], shape: tuple[int, int, int]
) -> NDArray[np.bool_]:
    box, mask = part
    axis, index = _cut(frame, plane, indices)
    thin = np.zeros([1 if each == axis else size for each, size in enumerate(shape)], bool)
    inside = index - box[axis].start
    if 0 <= inside < mask.shape[axis]:
        target, source = list(box), [slice(None)] * 3
        target[axis], source[axis] = slice(0, 1), slice(inside, inside + 1)
        thin[tuple(target)] = mask[tuple(source)]
    return plane_of(frame.to_ras(thin), plane, (0, 0, 0))


def _panel(ct: Volume, frame: Frame, plane: Plane, indices: Sequence[int]) -> _Panel:
    title, cut, across, down = plane
    axis, index = _cut(frame, plane, indices)
    part = tuple(slice(index, index + 1) if each == axis else slice(None) for each in range(3))
    image = plane_of(frame.to_ras(ct.hu(part)), plane, (0, 0, 0))
    rows, columns = image.shape
    spacing_mm = frame.ras_spacing_mm
    marks = ("A", "P") if across == 1 else ("R", "L")
    return _Panel(
        title=f"{title} {indices[cut] + 1}/{frame.ras_shape[cut]}",
        image=image,
        aspect=spacing_mm[down] / spacing_mm[across],
        width_mm=columns * spacing_mm[across],
        height_mm=rows * spacing_mm[down],
        left_mark=marks[0],
        right_mark=marks[1],
    )


def _draw(
    panels: list[_Panel],
    overlays: list[NDArray[Any]],
    legend: list[tuple[str, tuple[int, int, int]]],
    title: str,
) -> Figure:
    widths = [panel.width_mm / panel.height_mm for panel in panels]
    width, height, places = arrange(widths, WIDTH_INCHES)
    columns = LEGEND_COLUMNS if width == WIDTH_INCHES else LEGEND_COLUMNS // 2
    legend_rows = max(1, -(-len(legend) // columns))
    below = LEGEND_ROW_INCHES * legend_rows + 0.35
    total = height + below + 0.45
    figure = Figure(figsize=(width, total), facecolor="black")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        **places, left=0.01, right=0.99, bottom=below / total, top=(below + height) / total
    )
    for place, (panel, overlay) in enumerate(zip(panels, overlays, strict=True)):
        axes = figure.add_subplot(grid[place])
        axes.set_facecolor("black")
        axes.set_axis_off()
        axes.imshow(
            panel.image, cmap="gray", vmin=HU_WINDOW[0], vmax=HU_WINDOW[1], aspect=panel.aspect
        )
        axes.imshow(overlay, aspect=panel.aspect, interpolation="nearest")
        axes.set_title(panel.title, color="white", fontsize=10)
        style: dict[str, Any] = {"color": "white", "va": "center", "transform": axes.transAxes}
        axes.text(0.01, 0.5, panel.left_mark, ha="left", **style)
        axes.text(0.99, 0.5, panel.right_mark, ha="right", **style)
    handles = [
        Patch(color=(red / 255, green / 255, blue / 255), label=text)
        for text, (red, green, blue) in legend
    ]
    if handles:
        shown = figure.legend(
            handles=handles, loc="lower center", ncol=columns, fontsize=9,
            facecolor="black", edgecolor="black", labelcolor="white",
        )  # fmt: skip
        for text in shown.get_texts():
            text.set_parse_math(False)  # a dollar in a name is a dollar
    else:
        figure.text(0.5, 0.2 / total, "no structure found", color="white", ha="center")
    letters = title.encode("utf-8", "replace").decode()  # a file's name may hold other bytes
    style = {"color": "white", "va": "center", "fontsize": 9, "parse_math": False}
    figure.text(0.01, 1 - 0.2 / total, letters, **style)
    return figure
