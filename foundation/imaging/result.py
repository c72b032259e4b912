"""The result of segmenting a CT: masks and probabilities on its grid, made when asked for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from foundation import taxonomy
from foundation.errors import UsageError
from foundation.files import replacing
from foundation.imaging import bits
from foundation.imaging.frame import Box, Frame, bounding_box
from foundation.imaging.layout import ResultFiles
from foundation.imaging.legend import colour, display_name
from foundation.imaging.volumes import Volume, write_label_map, write_mask
from foundation.inference.sliding_window import QUANTA, ProbabilityMap

Layout = Literal["multilabel", "per_class", "both"]
LAYOUTS = ("multilabel", "per_class", "both")
SIDECAR_VERSION = 1


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

    volume: the CT. classes: the names that were segmented, in the order of the model.
    label_values: value of each class in a label map: its channel in the model + 1, also for a
        subset of the classes. parents: the organ that each lesion lies in, or None.
    threshold: a voxel belongs to a class where its probability exceeds this.
    maps, frame: probabilities on the network's grid, and how it lies on the file's.

    Classes may overlap: a tumour's voxels belong to its organ too.
    """

    volume: Volume
    frame: Frame
    maps: Mapping[str, ProbabilityMap]
    classes: tuple[str, ...]
    label_values: Mapping[str, int]
    parents: Mapping[str, str | None] = field(default_factory=dict)
    threshold: float = 0.5
    model_name: str = ""
    _packed: dict[str, _PackedMask | None] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        source = self.volume.path or "array"
        return f"Segmentation({str(source)!r}, {len(self.present)} of {len(self.classes)} present)"

    def mask(self, name: str) -> NDArray[np.bool_]:
        """Mask of a class (X, Y, Z), on the axes of the CT's file.

        Raises:
            UsageError: the class was not segmented.
        """
        mask = np.zeros(self.volume.shape, bool)
        packed = self._pack(taxonomy.resolve(name, self.classes))
        if packed is not None:
            mask[packed.box] = packed.unpack()
        return mask

    def probabilities(self, name: str) -> NDArray[np.float32]:
        """Probability of a class (X, Y, Z) in [0, 1] on the axes of the CT's file.

        In steps of 1/255, and after the clean-up: `probabilities(name) > threshold` is
        `mask(name)`. Zero far from the structure, where the model gave less than 0.05.

        Raises:
            UsageError: the class was not segmented.
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
        """One label for each voxel (X, Y, Z), uint8 or uint16; 0 is background.

        Where classes overlap, lesions lie over organs, and smaller structures over larger.
        """
        dtype = np.uint8 if max(self.label_values.values()) < 256 else np.uint16
        label_map: NDArray[np.integer] = np.zeros(self.volume.shape, dtype)
        for name in self._painting_order():
            found = self._found(name)
            label_map[found.box][found.unpack()] = self.label_values[name]
        return label_map

    def hidden_voxels(self, label_map: NDArray[np.integer]) -> dict[str, int]:
        """How many voxels of each class a label map shows under another class; 0 left out."""
        hidden = {}
        for name in self.present:
            found = self._found(name)
            under = found.unpack() & (label_map[found.box] != self.label_values[name])
            if under.any():
                hidden[name] = int(under.sum())
        return hidden

    def save(self, path: str | os.PathLike[str], *, layout: Layout = "multilabel") -> list[Path]:
        """Write the masks as NIfTI on the CT's grid, and a sidecar of names; return the files.

        path: a folder, which gets `segmentation.nii.gz`, `labels.json` and `segmentations/`; or a
            file name.nii.gz, beside which lie `name.labels.json` and `name_segmentations/`.
        layout: "multilabel" writes one label map; "per_class" one file for every class asked for,
            found or not; "both". Nothing is lost in a label map: a class that lies partly under
            another is written to its own file too, which the sidecar names.

        Every file appears whole or not at all, the sidecar last; files of these names are replaced.

        Raises:
            UsageError: unknown layout, or `path` is a file but not NIfTI.
        """
        if layout not in LAYOUTS:
            raise UsageError(f"Unknown layout {layout!r}. Choose from: {', '.join(LAYOUTS)}.")
        files = ResultFiles.of(Path(path))
        written: list[Path] = []
        hidden: dict[str, int] = {}
        if layout != "per_class":
            label_map = self.label_map()
            hidden = self.hidden_voxels(label_map)
            written.append(write_label_map(files.label_map, label_map, self.volume))
        own = tuple(hidden) if layout == "multilabel" else self.classes
        masks = {name: files.masks / f"{self._file_stem(name)}.nii.gz" for name in own}
        written += [write_mask(file, self.mask(name), self.volume) for name, file in masks.items()]
        places = {name: file.relative_to(files.sidecar.parent) for name, file in masks.items()}
        content = self._sidecar(hidden, places)
        content["label_map"] = files.label_map.name if layout != "per_class" else None
        with replacing(files.sidecar) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return [*written, files.sidecar]

    def _file_stem(self, name: str) -> str:
        """A class's name as a file's: a name is the model's own, and might hold a path."""
        safe = re.sub(r"[^\w-]+", "_", name)
        return safe if safe == name else f"{safe}_{self.label_values[name]}"

    def _sidecar(self, hidden: Mapping[str, int], files: Mapping[str, Path]) -> dict[str, Any]:
        truncated, volumes_ml = self.truncated, self.volumes_ml
        labels = {
            str(self.label_values[name]): {
                "name": name,
                "display": display_name(name),
                "colour": list(colour(name)),
                "parent": self.parents.get(name),
                "volume_ml": round(volumes_ml[name], 3),
                "truncated": name in truncated,
                # Voxels that the label map shows as another class; `file` has them all.
                "hidden_voxels": hidden.get(name, 0),
                "file": files[name].as_posix() if name in files else None,
            }
            for name in self.classes
        }
        return {
            "format_version": SIDECAR_VERSION,
            "ct": self.volume.path.name if self.volume.path else None,
            "model": self.model_name,
            "threshold": self.threshold,
            "labels": labels,
        }

    def _painting_order(self) -> list[str]:
        """Organs before lesions, large before small: what comes later lies on top."""
        voxels = {name: self._found(name).voxels for name in self.present}
        return sorted(voxels, key=lambda name: (self.parents.get(name) is not None, -voxels[name]))

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
