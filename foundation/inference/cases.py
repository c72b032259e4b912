"""The CTs that files and folders stand for, and where the results of each go."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foundation.errors import UsageError
from foundation.files import nifti_stem, portable_name
from foundation.imaging.layout import ResultFiles

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
    def id(self) -> str:
        """Twelve digits that stand for its name, where no name may be told.

        They are of a SHA-256: who guesses the name can confirm the guess.
        """
        return hashlib.sha256(self.name.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def find_cases(inputs: Sequence[str | Path], output: str | Path) -> list[Case]:
    """Find the CTs that files and folders stand for, each with its own place under `output`.

    A folder stands for its `ct.nii.gz`, or else for the NIfTI files in it, but for results of ours,
    and the `ct.nii.gz` of its subfolders. A case is called by its file, or by its folder where the
    file is called `ct`; nnU-Net's channel suffix `_0000` is dropped, and `_` stands for what
    Windows allows in no name, so that results can be copied there. A file that does not exist is a
    case that fails.

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
            found.setdefault(_real(ct), str(ct))
    cts = [Path(ct) for ct in found.values()]
    if nifti_stem(output) is not None:
        if len(cts) > 1 or any(Path(given).is_dir() for given in inputs):
            raise UsageError(f"{output} is one file for {len(cts)} CT(s); give -o a folder.")
        if _real(output) in found:
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
    names = [portable_name(name) for name in names]
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


def part_of(cases: Sequence[Case], part: str) -> list[Case]:
    """Return the cases of one of several jobs, which together have all of them once.

    Args:
        cases: From `find_cases`.
        part: "2/8", the second of eight jobs.

    Returns:
        Every eighth case, from the second on.

    Raises:
        UsageError: `part` is not such a text, or the first number is not from 1 to the second.
    """
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", part)
    number, count = (int(each) for each in found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"Part {part!r} is none. Give which of how many, from 1/8 to 8/8.")
    return list(cases[number - 1 :: count])


def _in_folder(folder: Path) -> list[Path]:
    own = _case_file(folder)
    if own:
        return [own]
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    ours = ResultFiles.inside(folder).earlier()
    files = [path for path in entries if path.is_file() and nifti_stem(path)]
    files = [path for path in files if path not in ours and not ResultFiles.of(path).done]
    inside = [ct for path in entries if path.is_dir() and (ct := _case_file(path))]
    if not files and not inside:
        raise UsageError(
            f"{folder} holds no CT: no .nii or .nii.gz file, and no subfolder with a ct.nii.gz. "
            "Convert DICOM with dcm2niix first."
        )
    return files + inside


def _real(path: Path) -> Path:
    """Where links lead to; unlike `resolve`, also for a link that leads to itself."""
    return Path(os.path.realpath(path))


def _case_file(folder: Path) -> Path | None:
    return next((folder / name for name in _CASE_FILES if (folder / name).is_file()), None)


def _case_name(ct: Path) -> str:
    name = ct.name
    if name in _CASE_FILES and _real(ct).parent.name:
        name = _real(ct).parent.name
    while (stem := nifti_stem(Path(name))) is not None:  # also of a.nii.nii.gz
        name = stem
    return name.removesuffix("_0000") or name
