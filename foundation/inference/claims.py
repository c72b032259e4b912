"""Claims on cases, so that several processes can fill one output folder.

A claim is a lock on a small hidden file beside the results (`flock`). The system frees it when the
process ends in whatever way, so that a file that a killed process has left claims nothing.

On NFS since Linux 2.6.12 such locks hold between machines too. Mounts with `local_lock=flock` or
`nolock`, and Lustre with `localflock`, keep them to one machine: give each machine its own part
there (`--part 2/8`). Where a file system has no such locks at all, or the system has none, the file
is the claim. What a killed process has left must then be removed by hand, and the message says so.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def claimed(path: Path) -> Iterator[str | None]:
    """Claim what a file stands for, until the block ends.

    Args:
        path: The claim's file. Missing parent folders are made. It is removed at the end.

    Yields:
        None if this process has the claim; otherwise a sentence about who has it.

    Raises:
        OSError: The file cannot be written.
    """
    made = [each for each in path.parents if not each.exists()]
    try:
        with _locked(path) as why:
            yield why
    finally:
        with suppress(OSError):  # results lie there now
            for each in made:
                each.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[str | None]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except FileNotFoundError:  # another process has just removed the folder, empty as it was
            continue
        try:
            locked = _lock(file)
            if locked is None:
                break
            if not locked:
                yield "Another process has it in work."
                return
            if _is_at(file, path):
                try:
                    yield None
                finally:  # while it is locked: nobody can have claimed it anew
                    path.unlink(missing_ok=True)
                return
            # Its owner removed it between our opening and locking it: begin anew.
        finally:
            os.close(file)
    with _by_existence(path) as why:
        yield why


def _lock(file: int) -> bool | None:
    """Whether the lock was free and is ours now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(file: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


@contextmanager
def _by_existence(path: Path) -> Iterator[str | None]:
    """The claim where there are no locks: who makes the second file has it."""
    path = path.with_name(f"{path.name}ed")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        yield f"Another process has it in work; if none runs any more, remove {path}."
        return
    try:
        yield None
    finally:
        path.unlink(missing_ok=True)
        path.with_name(path.name.removesuffix("ed")).unlink(missing_ok=True)
