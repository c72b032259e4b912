"""Names of files, and files and folders that appear whole or not at all.

A folder is written under another name beside its own. Then the earlier one is moved aside, the new
one takes its name, and the earlier one is removed. `recover_folder` puts in order what a killed
process has left of that.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from foundation.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NIFTI_SUFFIXES = (".nii.gz", ".nii")
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def nifti_stem(path: Path) -> str | None:
    """Return a file's name without .nii or .nii.gz, which may be in upper case.

    Args:
        path: The file, which need not exist.

    Returns:
        The name; None where it ends otherwise.
    """
    name = path.name
    for suffix in NIFTI_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return None


def portable_name(name: str) -> str:
    """Change a name that Windows cannot have, so that a folder can be copied there.

    Args:
        name: Of a file or folder.

    Returns:
        The name, in which `_` stands for each character that is not allowed there, for dots and
        spaces at the end, and before the name of a device such as CON.
    """
    safe = _FORBIDDEN.sub("_", name)
    end = len(safe.rstrip(". "))
    safe = safe[:end] + "_" * (len(safe) - end)
    return f"_{safe}" if _DEVICE.match(safe) else safe


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside a file; rename it to the file's when the block ends well.

    The temporary name keeps the suffixes (`.nii.gz`), since writers choose the format by them.
    After an error, nothing is left behind and an older file is untouched.

    Args:
        path: The file. Missing parent folders are made.

    Yields:
        A path that does not exist yet.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex[:12]}-{target.name}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def append_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Append lines to a file, so that each is whole.

    Several processes may append to one file: a lock keeps their lines apart, also on NFS, where
    appending alone does not. A line that a killed process has left unfinished is ended first.

    Args:
        path: The file. Missing parent folders are made.
        text: Whole lines.
        sync: Return when they are on the disk, and not only in the system's memory.

    Raises:
        OSError: It cannot be written; the error names the file. A part of a line is taken back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        try:
            alone = _lock_whole(file.fileno())
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else "\n" + text
            try:
                # Unbuffered, or closing the file would try again what has failed.
                _write_all(file.fileno(), text.encode("utf-8", "replace"))
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                if alone:
                    os.ftruncate(file.fileno(), size)
                raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def _write_all(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]


def _lock_whole(file: int) -> bool:
    """Wait for a file, which is free when it is closed; false where there are no locks."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            return True
    return False


@contextmanager
def replacing_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder beside another; it takes the other's place when the block ends well.

    After an error, nothing is left behind and an earlier folder is as it was. A kill can leave the
    earlier folder, or the new one, or neither: `recover_folder` brings the earlier one back, and is
    called here first. One process at a time may replace a folder.

    Args:
        folder: What is replaced, with all that it holds; it need not exist. Missing parent folders
            are made.

    Yields:
        The path of an empty folder.

    Raises:
        UsageError: `folder` is a file.
    """
    place, new, old = _beside(folder)
    if place.is_file():
        raise UsageError(f"{folder} is a file, where a folder is to be written. Give another name.")
    recover_folder(place)
    new.mkdir(parents=True)
    try:
        yield new
        if place.exists():
            place.replace(old)
        new.replace(place)
    finally:
        recover_folder(place)


def recover_folder(folder: str | os.PathLike[str]) -> None:
    """Finish or undo what a killed `replacing_folder` had begun; otherwise do nothing.

    Args:
        folder: What was being replaced. It must not be in the middle of that now.
    """
    place, new, old = _beside(folder)
    if old.exists() and not place.exists():
        old.replace(place)
    for rest in (old, new):
        if rest.exists():
            shutil.rmtree(rest)


def _beside(folder: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
    """The folder itself, and the names beside it under which one is written and moved aside."""
    place = Path(os.path.realpath(folder))  # of a link, what it leads to
    return place, place.with_name(f".{place.name}.new"), place.with_name(f".{place.name}.old")


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal.

    Args:
        path: The file.

    Returns:
        64 digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def path_sha256(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of a file, or of all files of a folder and their names.

    That of a folder is the SHA-256 of the lines that `sha256sum` prints for its files, with their
    paths within it, sorted by path.

    Args:
        path: A file or a folder.

    Returns:
        64 digits.

    Raises:
        UsageError: There is neither.
    """
    path = Path(path)
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        raise UsageError(f"{path} is neither a file nor a folder. Give one that exists.")
    files = {each.relative_to(path).as_posix(): each for each in path.rglob("*") if each.is_file()}
    lines = (f"{file_sha256(files[name])}  {name}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
