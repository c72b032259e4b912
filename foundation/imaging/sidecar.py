"""The sidecar of a segmentation: what its files hold, as JSON.

It is called `segmentation.json` in a folder of its own, and `STEM.segmentation.json` beside a file
`STEM.nii.gz`. A result is recognised by its content, never by the names of its files.

    label_map     file with one value a voxel, or null
    hidden        file with the voxels that the label map shows as another class, or null; see
                  `foundation.imaging.hidden`
    labels        value → name, colour, parent, volume, … of each class; `file`: its own mask
    files         every file of the result but the sidecar, relative to the sidecar's folder
    complete      false only while an earlier result is being replaced
    warnings      doubts about the CT or the result, in sentences
    quality       class → how far it can be trusted, see `foundation.imaging.trust`; null where it
                  was not looked at
    seconds, peak_memory_mib, ct_sha256
                  measurements; null where nothing was measured
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from foundation.errors import UsageError
from foundation.files import replacing
from foundation.imaging.trust import Trust

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Label:
    """One class of a segmentation.

    Attributes:
        name: The model's name for it.
        display: Its name for people.
        colour: Red, green, blue, 0 to 255.
        parent: The organ that a lesion lies in.
        volume_ml: Volume on the CT's grid in millilitres, 0.0 where it was not found.
        truncated: Whether it reaches the border of the scan: then the volume is of a part.
        hidden_voxels: Voxels that the label map shows as another class. Its own file has them, or
            the file of hidden voxels.
        file: Its own mask, relative to the sidecar's folder, where it has one.
    """

    name: str
    display: str
    colour: tuple[int, int, int]
    parent: str | None
    volume_ml: float
    truncated: bool
    hidden_voxels: int
    file: str | None


@dataclass(frozen=True)
class Sidecar:
    """What the files of one segmentation hold; the module's text describes the fields.

    Attributes:
        universal_ct: Version of the package that wrote it.
        ct: Name of the CT's file; None for an array.
        model: Name of the model.
        model_sha256: Of its weights: of their file, or of their values where they came from none;
            null where `segment_volume` was called alone with such weights.
        options: What the CT was segmented with: overlap, threshold, postprocess, layout, …
    """

    universal_ct: str
    ct: str | None
    model: str
    label_map: str | None
    labels: Mapping[str, Label]
    files: tuple[str, ...]
    hidden: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    model_sha256: str | None = None
    ct_sha256: str | None = None
    seconds: float | None = None
    peak_memory_mib: float | None = None
    quality: Mapping[str, Trust] | None = None
    complete: bool = True
    format: Literal["universal-ct segmentation"] = "universal-ct segmentation"

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        content = {"format": self.format, "format_version": FORMAT_VERSION} | asdict(self)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Sidecar:
        """Read what `write` wrote.

        Raises:
            UsageError: The file is missing, damaged, or no sidecar of this format version.
        """
        from foundation.settings import read, read_file

        values = read_file(path)
        if not isinstance(values, dict) or "format" not in values:
            raise UsageError(f"{path} is no sidecar of a segmentation: it names no format.")
        return read(cls, values, str(path), version=FORMAT_VERSION)


def find_sidecar(path: Path) -> Sidecar | None:
    """Return the sidecar at a path; None where no segmentation of ours has one there."""
    try:
        return Sidecar.read(path) if path.exists() else None
    except UsageError:
        return None
