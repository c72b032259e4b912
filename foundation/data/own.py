"""How cases of somebody's own lie on disk, and how they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from foundation.data.cases import Case, Scan, safe_id
from foundation.data.dataset import Adapter
from foundation.data.layouts import DatasetJson, Found, Patterns, Survey, read_splits
from foundation.data.reading import Image, Labels, onto_grid, overlay, read_label_map
from foundation.errors import VolumeError
from foundation.files import nifti_stem

IMAGES, MAPS = ("ct", "image", "imaging"), ("labels", "label", "segmentation")
_MASK_FOLDERS = ("segmentations", "masks")
LAYOUTS = (
    "a folder per case (ct.nii.gz with labels.nii.gz and labels.json, or with a mask per structure "
    "in segmentations/), nnU-Net's format (dataset.json, imagesTr, labelsTr), TotalSegmentator's "
    "tree, or a CSV table with the columns image, label, class"
)


@dataclass(frozen=True)
class OwnAdapter(Adapter):
    """An adapter that refuses what is no CT, since a few scans are all that is learnt from."""

    def read(self, case: Case) -> Scan:
        """As `Adapter.read`.

        Raises:
            VolumeError: also where no voxel is below 0 HU.
        """
        scan = super().read(case)
        if scan.ct is not None and scan.ct.min() >= 0:
            raise VolumeError(
                f"{case.image} has no voxel below 0 HU: an MR, a windowed CT, or one stored "
                "without its intercept of -1024. Give a CT in HU (air near -1000)."
            )
        return scan


@dataclass(frozen=True)
class Row:
    """A line of a table: a mask, or one value of a label map, and what it is of."""

    label: Path
    name: str
    value: int | None

    @property
    def source(self) -> str:
        """Its source label: with the value, so that a changed table is another dataset."""
        return self.name if self.value is None else f"{self.name} ({self.value})"


@dataclass(frozen=True)
class TableAdapter(OwnAdapter):
    """Cases of a table. rows: case id → its lines."""

    rows: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)

    def read_labels(self, case: Case, image: Image | None) -> tuple[Labels, NDArray[Any]]:
        """As `Adapter.read_labels`."""
        assert image is not None  # every line names one

        def masks() -> Iterator[tuple[str, NDArray[np.bool_]]]:
            for row in self.rows[case.id]:
                labels, affine = read_label_map(row.label)
                labels = onto_grid(labels, affine, image, row.label)
                yield row.source, labels > 0 if row.value is None else labels == row.value

        return overlay(image.array.shape, masks()), image.affine


@dataclass(frozen=True)
class CaseFolders:
    """A layout: every folder below the root with a scan in it is a case."""

    labels_as: Literal["label map", "masks"]
    expected: str = field(default=LAYOUTS, init=False)

    def survey(self, root: Path) -> Survey:
        """The cases whose labels are of this kind; a scan without labels is among the maps."""
        survey = Survey()
        splits = read_splits(root / "meta.csv") if (root / "meta.csv").is_file() else {}
        for folder, image in _scans(root):
            id_ = safe_id("_".join(folder.relative_to(root).parts) or root.name)
            here = [path for path in _niftis(folder) if path != image]
            maps = [path for path in here if str(nifti_stem(path)).lower() in MAPS]
            inner = [path for name in _MASK_FOLDERS for path in _niftis(folder / name)]
            kind = "masks" if not maps and (here or inner) else "label map"
            if kind != self.labels_as:
                continue
            if not maps and not here and not inner:
                survey.faults.append((id_, f"no labels for the image {image}."))
                continue
            split = splits.get(folder.name)
            if kind == "masks":
                survey.found.append(Found(id_, image, (*here, *inner), split))
                continue
            json = next((p for p in (folder, root) if (p / "labels.json").is_file()), None)
            names = json / "labels.json" if json else None
            files = (maps[0], names) if names else (maps[0],)
            survey.found.append(Found(id_, image, files, split, names))
        return survey.sort()


@dataclass(frozen=True)
class NnUNet:
    """A layout: nnU-Net's training cases, and those for testing where they have labels."""

    expected: str = field(default="dataset.json with imagesTr and labelsTr", init=False)

    def survey(self, root: Path) -> Survey:
        """Find both; a name that is in both counts once, for training."""
        survey = DatasetJson().survey(root)
        known = {each.id for each in survey.found}
        tests = Patterns(("imagesTs/{id}_0000.nii.gz",), ("labelsTs/{id}.nii.gz",)).survey(root)
        survey.found += [replace(f, split="test") for f in tests.found if f.id not in known]
        return survey.sort()


@dataclass(frozen=True)
class Fixed:
    """A layout: cases that are known already."""

    found: tuple[Found, ...]
    expected: str = field(default="the files of the table", init=False)

    def survey(self, root: Path) -> Survey:
        """These cases."""
        return Survey(list(self.found)).sort()


def _scans(root: Path) -> Iterator[tuple[Path, Path]]:
    """Every folder with a scan, and the scan; nothing below such a folder is one."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        stems = {str(nifti_stem(Path(name))).lower(): name for name in sorted(files)}
        image = next((stems[name] for name in IMAGES if name in stems), None)
        if image is not None:
            folders.clear()
            yield Path(folder), Path(folder) / image


def _niftis(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    visible = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return [path for path in visible if path.is_file() and nifti_stem(path) is not None]
