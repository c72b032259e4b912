"""Many CTs through one network: find them, segment each, leave its files.

For each CT these are the masks, `volumes.csv`, `segmentation.json` and, if wanted, `preview.png`;
see `Segmentation.save`.
"""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from foundation.errors import UniversalCTError, UsageError
from foundation.files import nifti_stem
from foundation.imaging.layout import ResultFiles
from foundation.imaging.sidecar import Sidecar

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from foundation.imaging.result import Layout
    from foundation.inference.options import FolderOptions, InferenceOptions
    from foundation.networks.protocol import Network

Existing = Literal["refuse", "skip", "overwrite"]

_CASE_FILES = ("ct.nii.gz", "ct.nii")  # ID/ct.nii.gz, as in TotalSegmentator and AbdomenAtlas
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # the next CT would meet it too


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


@dataclass(frozen=True)
class Outcome:
    """What became of one CT.

    Attributes:
        case: Name of the case.
        ct: Path of the CT.
        status: "done", "skipped" or "failed".
        files: What was written.
        volumes_ml: Class name → millilitres, 0.0 where it was not found.
        truncated: Classes that reach the border of the scan.
        warnings: Doubts about the CT or the result, in sentences.
        seconds: From reading the CT to the last file.
        error: What went wrong, where it failed.
    """

    case: str
    ct: str
    status: Literal["done", "skipped", "failed"]
    files: list[str] = field(default_factory=list)
    volumes_ml: dict[str, float] = field(default_factory=dict)
    truncated: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None


def segment_folder(
    network: Network,
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    existing: Existing = "refuse",
    report: Callable[[Outcome], None] | None = None,
    **options: Unpack[FolderOptions],
) -> list[Outcome]:
    """Segment many CTs and save each result; a CT that fails does not stop the others.

    Args:
        network: A model of `from_pretrained`, or any network that `segment_volume` takes.
        inputs: Files and folders, see `find_cases`.
        output: Folder that receives a folder for each CT; for one CT also a file name.nii.gz.
        existing: What to do where results are already: "refuse", "skip" those CTs, or "overwrite".
        report: Called with the outcome of each CT when it is known.
        **options: classes, device, overlap, postprocess and progress as of `segment_volume`; layout
            and preview as of `Segmentation.save`.

    Returns:
        What became of each CT.

    Raises:
        UsageError: See `find_cases` and `still_to_do`; or a class or an option is unknown.
    """
    given = [inputs] if isinstance(inputs, str | Path) else inputs
    cases = find_cases(given, output)
    outcomes = []
    for outcome in segment_cases(network, cases, existing=existing, **options):
        outcomes.append(outcome)
        if report:
            report(outcome)
    return outcomes


def find_cases(inputs: Sequence[str | Path], output: str | Path) -> list[Case]:
    """Find the CTs that files and folders stand for, each with its own place under `output`.

    A folder stands for its `ct.nii.gz`, or else for the NIfTI files in it and the `ct.nii.gz` of
    its subfolders. A case is called by its file, or by its folder where the file is called `ct`;
    nnU-Net's channel suffix `_0000` is dropped. A file that does not exist is a case that fails.

    Args:
        inputs: Files and folders.
        output: A folder, or for one CT a file name.nii.gz.

    Returns:
        The cases, in the order of `inputs`.

    Raises:
        UsageError: A folder without CTs, a CT whose name gives none to its folder, two cases of one
            name, several CTs for one output file, or an output that is the CT itself or cannot be a
            folder.
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
    if nameless := [ct for ct, name in zip(cts, names, strict=True) if not name.strip(". ")]:
        raise UsageError(
            f"{nameless[0]} gives no name to the folder of its results, which must lie inside of "
            f"{output}. Rename the file, or give -o a file .nii.gz."
        )
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


def still_to_do(cases: Sequence[Case], existing: Existing) -> list[Case]:
    """Return the cases to segment, given what is there already.

    Args:
        cases: From `find_cases`.
        existing: See `segment_folder`.

    Returns:
        Those without results; all of them if `existing` is "overwrite".

    Raises:
        UsageError: Results are there and `existing` is "refuse"; or files are there that no result
            of ours names, which are never replaced.
    """
    for case in cases:
        case.files.refuse_foreign()
    done = [case for case in cases if case.files.done]
    if done and existing == "refuse":
        more = f" and {len(done) - 1} more" if len(done) > 1 else ""
        raise UsageError(
            f"{done[0].output}{more} already holds a segmentation. "
            "Add --overwrite or --skip-existing, or give another -o."
        )
    return [case for case in cases if existing == "overwrite" or case not in done]


def segment_cases(
    network: Network | None,
    cases: Sequence[Case],
    *,
    existing: Existing = "refuse",
    debug: bool = False,
    **options: Unpack[FolderOptions],
) -> Iterator[Outcome]:
    """Segment cases one after the other; whatever goes wrong with one must not cost the others.

    A full or read-only disk ends it, since all that follows would be computed in vain: the cases
    that are left fail without being tried.

    Args:
        network: See `segment_folder`; None where no CT exists.
        cases: From `find_cases`.
        existing: See `segment_folder`.
        debug: Raise whatever goes wrong with a CT.
        **options: See `segment_folder`.

    Yields:
        What became of each CT, in the order of `cases`.

    Raises:
        UsageError: See `still_to_do`; or the request is wrong for every CT.
    """
    todo = still_to_do(cases, existing)
    no_room = ""
    for case in cases:
        if case not in todo:
            yield Outcome(case.name, str(case.ct), "skipped")
            continue
        if no_room:
            yield _failed(case, f"not tried, because of {no_room}")
            continue
        if network is None or not case.ct.exists():
            yield _failed(case, f"{case.ct} does not exist. Check the path.")
            continue
        try:
            yield segment_case(network, case, **options)
        except UsageError:
            raise  # the request itself is wrong, for every CT
        except Exception as error:
            if debug:
                raise
            expected = isinstance(error, UniversalCTError | OSError)
            reason = str(error) if expected else f"{type(error).__name__}: {error} (see --debug)"
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                no_room = reason
            yield _failed(case, reason)


def segment_case(
    network: Network,
    case: Case,
    *,
    classes: str | Sequence[str] | None = None,
    layout: Layout = "multilabel",
    preview: bool = False,
    **options: Unpack[InferenceOptions],
) -> Outcome:
    """Segment one CT and write its files.

    Args:
        network: See `segment_folder`.
        case: The CT and where its results go.
        classes: As of `segment_volume`.
        layout: As of `Segmentation.save`.
        preview: As of `Segmentation.save`.
        **options: As of `segment_volume`.

    Returns:
        What was written and found.

    Raises:
        VolumeError: The CT cannot be read.
        UsageError: A class or an option is unknown.
        OSError: A file cannot be written.
    """
    from foundation.inference.predict import segment_volume

    start = time.monotonic()
    segmentation = segment_volume(network, case.ct, classes=classes, **options)
    taken = round(time.monotonic() - start, 1)
    files = segmentation.save(case.output, layout=layout, preview=preview, seconds=taken)
    return Outcome(
        case=case.name,
        ct=str(case.ct),
        status="done",
        files=[str(path) for path in files],
        volumes_ml={name: round(ml, 3) for name, ml in segmentation.volumes_ml.items()},
        truncated=list(segmentation.truncated),
        warnings=list(Sidecar.read(files[-1]).warnings),
        seconds=round(time.monotonic() - start, 1),
    )


def _failed(case: Case, error: str) -> Outcome:
    return Outcome(case.name, str(case.ct), "failed", error=error)


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
    while (stem := nifti_stem(Path(name))) is not None:  # also of a.nii.nii.gz
        name = stem
    return name.removesuffix("_0000") or name
