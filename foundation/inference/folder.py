"""Many CTs through one model: find them, segment each, leave its files.

For each CT: the masks and `labels.json` (see `Segmentation.save`), `volumes.csv` and, if wanted,
`preview.png`. `labels.json` is written last: where it is, the CT is done.
"""

from __future__ import annotations

import csv
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from foundation.errors import UsageError
from foundation.files import nifti_stem, replacing
from foundation.imaging.layout import ResultFiles

if TYPE_CHECKING:
    from foundation.imaging.result import Layout, Segmentation
    from foundation.model import UniversalModel

_VOLUMES, _PREVIEW = "volumes.csv", "preview.png"
_CASE_FILES = ("ct.nii.gz", "ct.nii")  # ID/ct.nii.gz, as in TotalSegmentator and AbdomenAtlas


@dataclass(frozen=True)
class Case:
    """One CT and where its results go: a folder, or a file named .nii or .nii.gz."""

    name: str
    ct: Path
    output: Path

    @property
    def files(self) -> ResultFiles:
        """Where the results lie."""
        # A case's folder may be called `scan.dcm`, after scan.dcm.nii.gz.
        is_file = nifti_stem(self.output) is not None
        return ResultFiles.of(self.output) if is_file else ResultFiles.inside(self.output)

    @property
    def done(self) -> bool:
        """Whether results are there already."""
        files = self.files
        return files.sidecar.exists() or (not files.in_folder and files.label_map.exists())

    @property
    def foreign(self) -> Path | None:
        """Masks in the place of this case's that no run of ours wrote, e.g. a dataset's own."""
        files = self.files
        if files.sidecar.exists() or files.beside(_VOLUMES).exists():
            return None  # a run of ours, finished or broken off: it writes the volumes first
        if files.in_folder and files.label_map.exists():
            return files.label_map
        return files.masks if files.masks.is_dir() and any(files.masks.iterdir()) else None


@dataclass(frozen=True)
class Settings:
    """How every CT of a run is segmented; see `UniversalModel.segment` and `Segmentation.save`."""

    classes: Sequence[str] | None = None
    device: str = "auto"
    overlap: float | None = None
    layout: Layout = "multilabel"
    preview: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of one CT; `error` is set where it failed."""

    case: str
    ct: str
    status: Literal["done", "skipped", "failed"]
    files: list[str] = field(default_factory=list)
    volumes_ml: dict[str, float] = field(default_factory=dict)
    truncated: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None


def find_cases(inputs: Sequence[str | Path], output: str | Path) -> list[Case]:
    """The CTs that files and folders stand for, each with its own place under `output`.

    A folder stands for its `ct.nii.gz`, or else for the NIfTI files in it and the `ct.nii.gz` of
    its subfolders. A case is called by its file, or by its folder where the file is called `ct`;
    nnU-Net's channel suffix `_0000` is dropped. A file that does not exist is a case that fails.

    Raises:
        UsageError: a folder without CTs, two cases of one name, several CTs for one output file,
            or an output that is the CT itself or cannot be a folder.
    """
    output = Path(output)
    found: dict[Path, str] = {}
    for given in map(Path, inputs):
        for ct in _in_folder(given) if given.is_dir() else [given]:
            found.setdefault(ct.resolve(), str(ct))
    cts = [Path(ct) for ct in found.values()]
    if nifti_stem(output) is not None:
        if len(cts) > 1 or any(Path(given).is_dir() for given in inputs):
            raise UsageError(f"{output} is one file for {len(cts)} CT(s); give -o a folder.")
        if output.resolve() in found:
            raise UsageError(f"{output} is the CT itself. Give another name to its segmentation.")
        return [Case(_case_name(cts[0]), cts[0], output)]
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file, not a folder. Give -o a folder or a .nii.gz file.")
    names = [_case_name(ct) for ct in cts]
    # Some file systems do not tell small from capital letters.
    count = Counter(name.casefold() for name in names)
    double = next((name for name in names if count[name.casefold()] > 1), None)
    if double:
        same = zip(names, cts, strict=True)
        which = ", ".join(str(ct) for name, ct in same if name.casefold() == double.casefold())
        raise UsageError(
            f"{which} would all be written to {output / double}. "
            "Segment them in runs with different -o."
        )
    return [Case(name, ct, output / name) for name, ct in zip(names, cts, strict=True)]


def still_to_do(cases: Sequence[Case], *, overwrite: bool, skip_existing: bool) -> list[Case]:
    """The cases to segment, given what is there already.

    Raises:
        UsageError: results are there and neither of the two options says what to do; or masks are
            there that no run of ours wrote, which are never replaced.
    """
    foreign = next((path for case in cases if (path := case.foreign)), None)
    if foreign:
        raise UsageError(
            f"{foreign} was there before and is not universal-ct's. Give another -o, or move it."
        )
    done = [case for case in cases if case.done]
    if done and not overwrite and not skip_existing:
        more = f" and {len(done) - 1} more" if len(done) > 1 else ""
        raise UsageError(
            f"{done[0].output}{more} already holds a segmentation. "
            "Add --overwrite or --skip-existing, or give another -o."
        )
    return list(cases) if overwrite else [case for case in cases if not case.done]


def segment_case(model: UniversalModel, case: Case, settings: Settings) -> Outcome:
    """Segment one CT and write its files.

    Raises:
        VolumeError: the CT cannot be read.
        OSError: a file cannot be written.
    """
    start = time.monotonic()
    segmentation = model.segment(
        case.ct,
        classes=settings.classes,
        device=settings.device,
        overlap=settings.overlap,
        progress=settings.progress,
    )
    places = case.files
    for path in _earlier_files(places):
        path.unlink(missing_ok=True)
    files = [_write_volumes(segmentation, places.beside(_VOLUMES))]
    if settings.preview:
        from foundation.imaging.preview import save_preview

        files.append(save_preview(segmentation.volume, segmentation, places.beside(_PREVIEW)))
    files += segmentation.save(case.output, layout=settings.layout)
    return Outcome(
        case=case.name,
        ct=str(case.ct),
        status="done",
        files=[str(path) for path in files],
        volumes_ml={name: round(ml, 3) for name, ml in segmentation.volumes_ml.items()},
        truncated=list(segmentation.truncated),
        seconds=round(time.monotonic() - start, 1),
    )


def volume_table(outcome: Outcome) -> str:
    """The classes that were found, with their volumes, as lines of text."""
    found = {name: ml for name, ml in outcome.volumes_ml.items() if ml > 0}
    wide = max(map(len, found), default=5)
    rows = [
        f"{name:<{wide}}  {ml:>9.1f}{'  cut by the border' if name in outcome.truncated else ''}"
        for name, ml in found.items()
    ]
    return "\n".join([f"{'class':<{wide}}  {'volume_ml':>9}", *(rows or ["nothing found"])])


def _write_volumes(segmentation: Segmentation, path: Path) -> Path:
    truncated = segmentation.truncated
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "volume_ml", "truncated"])
        for name, ml in segmentation.volumes_ml.items():
            writer.writerow([name, f"{ml:.3f}", str(name in truncated).lower()])
    return path


def _earlier_files(places: ResultFiles) -> list[Path]:
    """Files of an earlier run of this case, which would contradict the new ones.

    The sidecar comes first: without it, a run that breaks off leaves nothing that looks finished.
    """
    try:
        content = json.loads(places.sidecar.read_text(encoding="utf-8"))
        names = [content["label_map"], *(row["file"] for row in content["labels"].values())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # no sidecar, or none of ours: then nothing here is ours to remove
    folder = places.sidecar.parent
    paths = [folder / name for name in names if isinstance(name, str)]
    masks = [p for p in paths if nifti_stem(p) and p.resolve().is_relative_to(folder.resolve())]
    return [places.sidecar, *masks, places.beside(_PREVIEW)]


def _in_folder(folder: Path) -> list[Path]:
    own = _case_file(folder)
    if own:
        return [own]
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in entries if path.is_file() and nifti_stem(path)]
    inside = [ct for path in entries if path.is_dir() and (ct := _case_file(path))]
    if not files and not inside:
        raise UsageError(
            f"{folder} holds no CT: no .nii or .nii.gz file, and no subfolder with a ct.nii.gz. "
            "Convert DICOM with dcm2niix first."
        )
    return files + inside


def _case_file(folder: Path) -> Path | None:
    return next((folder / name for name in _CASE_FILES if (folder / name).is_file()), None)


def _case_name(ct: Path) -> str:
    name = ct.name
    if name in _CASE_FILES and ct.resolve().parent.name:
        name = ct.resolve().parent.name
    while stem := nifti_stem(Path(name)):  # also of a.nii.nii.gz
        name = stem
    return name.removesuffix("_0000") or name
