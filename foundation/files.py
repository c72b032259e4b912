"""Names of files, and files and folders that appear whole or not at all.

A folder is written under another name beside its own. Then the earlier one is moved aside, the new
one takes its name, and the earlier one is removed. `recover_folder` puts in order what a killed
process has left of that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from foundation.errors import UniversalCTError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NIFTI_SUFFIXES = (".nii.gz", ".nii")
MOST_TEXT_BYTES = 10_000_000  # of a description; the longest of ours has 200 kB
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


def read_text(path: Path, *, error: type[UniversalCTError] = UsageError) -> str:
    """Read a file of text that may come from anybody.

    Args:
        path: The file.
        error: The class of the exception.

    Returns:
        Its text.

    Raises:
        UsageError: It cannot be read, is no UTF-8, or has more than `MOST_TEXT_BYTES`. Raised as
            `error` where that is given.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_TEXT_BYTES + 1)
        if len(content) > MOST_TEXT_BYTES:
            raise error(f"{path} has more than {MOST_TEXT_BYTES} bytes; it is no description.")
        return content.decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as wrong:
        raise error(f"{path} cannot be read as text: {wrong}.") from wrong


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


SEAL = "sha256"  # the key of a sealed text's own sum


def sealed_json(content: Mapping[str, Any]) -> str:
    """Write keys and values as JSON with a sum of their own, which `read_sealed` checks.

    Args:
        content: Plain values; its keys are sorted.

    Returns:
        The text, which ends with a line break.
    """
    plain = json.loads(json.dumps(content))  # in the form that it is read back in
    return json.dumps({**plain, SEAL: _seal(plain)}, indent=1, sort_keys=True) + "\n"


def read_sealed(text: str) -> dict[str, Any]:
    """Read what `sealed_json` wrote, or JSON that was never sealed.

    Args:
        text: Of the file.

    Returns:
        The keys and values, without the seal.

    Raises:
        ValueError: It is no JSON of keys and values, or its values are not those that were sealed.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it has too many brackets") from error
    if not isinstance(content, dict):
        raise ValueError("it does not hold keys and values")
    seal = content.pop(SEAL, None)
    if seal is not None and seal != _seal(content):
        raise ValueError(f"its values are not those that it was written with ({SEAL} differs)")
    return content


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
