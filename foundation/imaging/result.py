"""The result of segmenting a CT: masks and probabilities on its grid, made when asked for."""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from foundation import __version__, taxonomy
from foundation.errors import UsageError
from foundation.imaging import bits
from foundation.imaging.frame import Box, Frame, bounding_box
from foundation.imaging.hidden import HiddenVoxels, write_hidden
from foundation.imaging.layout import ResultFiles, Writing
from foundation.imaging.legend import colours, display_name
from foundation.imaging.probabilities import QUANTA, ProbabilityMap
from foundation.imaging.sidecar import Label, Sidecar
from foundation.imaging.trust import TRUST_COLUMNS, Trust
from foundation.imaging.volumes import Volume, VolumeWarning
from foundation.imaging.writing import write_label_map, write_mask

Layout = Literal["multilabel", "per_class", "both"]
LAYOUTS = ("multilabel", "per_class", "both")


def check_layout(layout: str) -> None:
    """Refuse what is no layout.

    Raises:
        UsageError: See above.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"Unknown layout {layout!r}. Choose from: {', '.join(LAYOUTS)}.")


@dataclass(frozen=True)
class _PackedMask:
    """A mask cropped to its box, eight voxels a byte: every class of a CT fits in memory."""

    box: Box
    shape: tuple[int, ...]
    bits: NDArray[np.uint8]
    voxels: int

    def unpack(self) -> NDArray[np.bool_]:
        return bits.unpack(self.bits, self.shape[-1])


@dataclass(frozen=True)
class Segmentation:
    """Masks of one CT, on exactly the grid of its file.

    Classes may overlap: a tumour's voxels belong to its organ too.

    Attributes:
        volume: The CT.
        frame: How the network's grid lies on the file's.
        maps: Class name → probabilities on the network's grid.
        classes: The names that were segmented, in the order of the model.
        label_values: Value of each class in a label map: its channel in the model + 1, also for a
            subset of the classes.
        parents: Each class of the model → the organ that the lesion lies in, or None.
        threshold: A voxel belongs to a class where its probability exceeds this.
        model_name: Name of the model.
        model_sha256: Of its weights, where it has one.
        options: What else the CT was segmented with, for the sidecar.
        trust: Class name → how far its mask can be trusted; empty where it was not looked at.
        doubts: What is odd about the body, in sentences.
    """

    volume: Volume
    frame: Frame
    maps: Mapping[str, ProbabilityMap]
    classes: tuple[str, ...]
    label_values: Mapping[str, int]
    parents: Mapping[str, str | None] = field(default_factory=dict)
    threshold: float = 0.5
    model_name: str = ""
    model_sha256: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    trust: Mapping[str, Trust] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()
    _packed: dict[str, _PackedMask | None] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        source = self.volume.path or "array"
        return f"Segmentation({str(source)!r}, {len(self.present)} of {len(self.classes)} present)"

    @cached_property
    def colours(self) -> dict[str, tuple[int, int, int]]:
        """Red, green, blue of each class of the model: no two alike, whichever are asked for."""
        return colours(dict.fromkeys([*self.parents, *self.classes]))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Doubts about the CT and the body in it, in sentences; empty where there are none."""
        return (*self.volume.warnings, *self.doubts)

    def mask(self, name: str) -> NDArray[np.bool_]:
        """Return the mask of a class.

        Args:
            name: Of the class, or an alias.

        Returns:
            (X, Y, Z), bool, on the axes of the CT's file.

        Raises:
            UsageError: The class was not segmented.
        """
        # In Fortran's order, as NIfTI stores it: written from C's, a mask of 512 × 512 × 200 voxels
        # took six times as long.
        mask = np.zeros(self.volume.shape, bool, order="F")
        packed = self._pack(taxonomy.resolve(name, self.classes))
        if packed is not None:
            mask[packed.box] = packed.unpack()
        return mask

    def boxed(self, name: str) -> tuple[Box, NDArray[np.bool_]]:
        """Return the box around a mask, and the mask inside it: less memory than the whole.

        Args:
            name: Of a class that is `present`.
        """
        found = self._found(name)
        return found.box, found.unpack()

    def probabilities(self, name: str) -> NDArray[np.float32]:
        """Return the probability of a class, after the post-processing.

        `probabilities(name) > threshold` is `mask(name)`.

        Args:
            name: Of the class, or an alias.

        Returns:
            (X, Y, Z) in [0, 1], in steps of 1/255, on the axes of the CT's file. Zero far from the
            structure, where the model gave less than 0.05.

        Raises:
            UsageError: The class was not segmented.
        """
        name = taxonomy.resolve(name, self.classes)
        grid = np.zeros(self.volume.shape, np.float32)
        if name in self.maps:
            found = self.maps[name]
            values, box = self.frame.to_file(found.values, found.start)
            grid[box] = values / QUANTA
        return grid

    @cached_property
    def volumes_ml(self) -> dict[str, float]:
        """Volume of each class in millilitres on the CT's grid, 0.0 where it was not found.

        Only what the scan shows: see `truncated`.
        """
        packed = {name: self._pack(name) for name in self.classes}
        return {
            name: mask.voxels * self.volume.voxel_ml if mask else 0.0
            for name, mask in packed.items()
        }

    @property
    def present(self) -> tuple[str, ...]:
        """The classes that were found, by at least one voxel."""
        return tuple(name for name in self.classes if self._pack(name) is not None)

    @property
    def truncated(self) -> tuple[str, ...]:
        """The classes that reach the border of the scan: their volume in ml is of a part."""
        size = self.volume.shape
        return tuple(
            name
            for name in self.present
            if any(
                part.start == 0 or part.stop == end
                for part, end in zip(self._found(name).box, size, strict=True)
            )
        )

    def label_map(self) -> NDArray[np.integer]:
        """Return one label for each voxel (X, Y, Z), uint8 or uint16; 0 is background.

        Where classes overlap, lesions lie over organs, and smaller structures over larger.
        """
        dtype = np.uint8 if max(self.label_values.values()) < 256 else np.uint16
        label_map: NDArray[np.integer] = np.zeros(self.volume.shape, dtype, order="F")
        voxels = {name: self._found(name).voxels for name in self.present}
        for name in sorted(voxels, key=lambda n: (self.parents.get(n) is not None, -voxels[n])):
            found = self._found(name)
            label_map[found.box][found.unpack()] = self.label_values[name]
        return label_map

    def hidden(self, label_map: NDArray[np.integer]) -> dict[str, HiddenVoxels]:
        """Find the voxels of each class that a label map shows as another class.

        Args:
            label_map: What `label_map` returned (X, Y, Z).

        Returns:
            Class name → voxels; without the classes that are shown whole.
        """
        hidden = {}
        for name in self.present:
            found = self._found(name)
            under = found.unpack() & (label_map[found.box] != self.label_values[name])
            x, y, z = (part.start for part in found.box)
            voxels = HiddenVoxels.of(under, (x, y, z))
            if voxels is not None:
                hidden[name] = voxels
        return hidden

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        layout: Layout = "multilabel",
        preview: bool = False,
        seconds: float | None = None,
        peak_memory_mib: float | None = None,
        ct_sha256: str | None = None,
    ) -> list[Path]:
        """Write the masks as NIfTI on the CT's grid, a table of volumes, and a sidecar.

        All files appear at once, when the last of them is written. An earlier result of ours is
        replaced, files of others never are. Nothing is lost in a label map: the voxels of a class
        that lie under another are written to a small file, see `foundation.imaging.hidden`.

        Args:
            path: A folder, which gets `segmentation.nii.gz`, `hidden.npz` where classes overlap,
                `segmentations/`, `volumes.csv` and `segmentation.json`; or a file name.nii.gz,
                beside which lie `name.hidden.npz`, `name_segmentations/`, `name.volumes.csv` and
                `name.segmentation.json`.
            layout: "multilabel" writes one label map; "per_class" one file for every class asked
                for, found or not; "both".
            preview: Also write a picture, `preview.png`.
            seconds: What the segmentation took, for the sidecar.
            peak_memory_mib: The most memory that the process has had, for the sidecar.
            ct_sha256: Of the CT's file, for the sidecar: `segment_folder` knows by it whether a
                result is of the same CT.

        Returns:
            The files, the sidecar last.

        Raises:
            UsageError: Unknown layout, `path` is a file but not NIfTI, or files are in the way that
                are not a result of ours.
            OSError: A file cannot be written; the error names it.
        """
        check_layout(layout)
        places = ResultFiles.of(Path(path))
        doubts = [*self.warnings]
        hidden: dict[str, HiddenVoxels] = {}
        with places.replacing() as result:
            if layout != "per_class":
                label_map = self.label_map()
                hidden = self.hidden(label_map)
                with result.file(places.label_map) as file:
                    write_label_map(file, label_map, self.volume)
                del label_map
            if hidden and layout == "multilabel":  # else every class has its own file
                with result.file(places.hidden) as file:
                    write_hidden(file, {self.label_values[n]: each for n, each in hidden.items()})
            own = {}
            for name in () if layout == "multilabel" else self.classes:
                with result.file(places.masks / f"{self._file_stem(name)}.nii.gz") as file:
                    write_mask(file, self.mask(name), self.volume)
                own[name] = result.names()[-1]
            if preview:
                doubts += self._write_preview(result, places.preview)
            with result.file(places.volumes) as file:
                self._write_volumes(file, doubts)
            sidecar = Sidecar(
                universal_ct=__version__,
                ct=_text(self.volume.path.name) if self.volume.path else None,
                model=self.model_name,
                model_sha256=self.model_sha256,
                label_map=None if layout == "per_class" else places.label_map.name,
                labels=self._labels({name: each.count for name, each in hidden.items()}, own),
                hidden=places.hidden.name if places.hidden in result.files else None,
                files=result.names(),
                options={
                    **{"threshold": self.threshold, "layout": layout, "preview": preview},
                    **self.options,
                },
                warnings=tuple(map(_text, doubts)),
                seconds=seconds,
                peak_memory_mib=peak_memory_mib,
                ct_sha256=ct_sha256,
                quality=self.trust or None,
            )
            with result.file(places.sidecar) as file:
                sidecar.write(file)
        return result.files

    def _write_preview(self, result: Writing, target: Path) -> list[str]:
        """Draw the picture; whatever goes wrong with it must not cost the masks."""
        from foundation.imaging.preview import save_preview

        try:
            with result.file(target) as file:
                save_preview(self.volume, self, file)
        except OSError:
            raise
        except Exception as error:
            doubt = f"The preview could not be drawn: {error!r}."
            warnings.warn(doubt, VolumeWarning, stacklevel=3)
            return [doubt]
        return []

    def _write_volumes(self, path: Path, doubts: list[str]) -> None:
        truncated = self.truncated
        with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "volume_ml", "truncated", *TRUST_COLUMNS, "warnings"])
            for name, ml in self.volumes_ml.items():
                trust = self.trust[name].row() if name in self.trust else [""] * len(TRUST_COLUMNS)
                row = [name, f"{ml:.3f}", str(name in truncated).lower(), *trust]
                writer.writerow([*row, " ".join(doubts)])

    def _file_stem(self, name: str) -> str:
        """A class's name as a file's: a name is the model's own, and might hold a path."""
        safe = re.sub(r"[^\w-]+", "_", name)
        return safe if safe == name else f"{safe}_{self.label_values[name]}"

    def _labels(self, hidden: Mapping[str, int], files: Mapping[str, str]) -> dict[str, Label]:
        truncated = self.truncated
        return {
            str(self.label_values[name]): Label(
                name=name,
                display=display_name(name),
                colour=self.colours[name],
                parent=self.parents.get(name),
                volume_ml=round(self.volumes_ml[name], 3),
                truncated=name in truncated,
                hidden_voxels=hidden.get(name, 0),
                file=files.get(name),
            )
            for name in self.classes
        }

    def _pack(self, name: str) -> _PackedMask | None:
        if name not in self._packed:
            self._packed[name] = self._make(name)
        return self._packed[name]

    def _found(self, name: str) -> _PackedMask:
        packed = self._pack(name)
        assert packed is not None, f"{name} is not present"
        return packed

    def _make(self, name: str) -> _PackedMask | None:
        if name not in self.maps:
            return None
        found = self.maps[name]
        array, reach = self.frame.to_file(found.values, found.start, self.threshold * QUANTA)
        box = bounding_box(array)
        if box is None:
            return None
        x, y, z = (
            slice(far.start + near.start, far.start + near.stop)
            for far, near in zip(reach, box, strict=True)
        )
        part = array[box]
        return _PackedMask((x, y, z), part.shape, bits.pack(part), int(part.sum()))


def _text(text: str) -> str:
    """A text that every file can hold: names of files may have bytes that are no letters."""
    return text.encode("utf-8", "replace").decode()
