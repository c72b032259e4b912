"""How much memory is free, so that a file that needs more is refused before it takes it."""

from __future__ import annotations

import os
from pathlib import Path

from foundation.errors import VolumeError

_GIGABYTE = 1e9
_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def require_memory(needed_bytes: int, what: str) -> None:
    """Refuse what needs more memory than is free.

    Where the system does not tell what is free, nothing is refused.

    Args:
        needed_bytes: At least so much will be taken.
        what: Needs it, as the subject of a sentence.

    Raises:
        VolumeError: Less is free.
    """
    free = available_bytes()
    if free is not None and needed_bytes > free:
        raise VolumeError(
            f"{what} needs about {needed_bytes / _GIGABYTE:.3g} GB of memory; "
            f"{free / _GIGABYTE:.3g} GB are free. Close other programs, use a machine with more "
            "memory, or crop or resample the volume. Is its size in the header right?"
        )


def available_bytes() -> int | None:
    """Return how much memory this process can still take, swap included.

    It is the least of what the machine and each control group (of a container or a batch job) have
    left. Control groups do not count files that can be dropped.

    Returns:
        Bytes; None where the system does not tell.
    """
    known = [_machine(), *_version_2(), _version_1()]
    return min((free for free in known if free is not None), default=None)


def _machine() -> int | None:
    table = _table(_PROC / "meminfo")
    if "MemAvailable" in table:
        return (table["MemAvailable"] + table.get("SwapFree", 0)) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _version_2() -> list[int | None]:
    """Of each unified group that the process is in, from its own up to the root."""
    lines = _text(_PROC / "self" / "cgroup").splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = _CGROUP / own.strip("/")
    groups = [folder, *folder.parents]
    inside = [group for group in groups if group == _CGROUP or _CGROUP in group.parents]
    return [
        _left(
            group / "memory.max", group / "memory.current", group / "memory.stat", "inactive_file"
        )
        for group in inside
    ]


def _version_1() -> int | None:
    group = _CGROUP / "memory"
    usage = group / "memory.usage_in_bytes"
    return _left(
        group / "memory.limit_in_bytes", usage, group / "memory.stat", "total_inactive_file"
    )


def _left(limit: Path, usage: Path, stat: Path, droppable: str) -> int | None:
    most, used = _text(limit).strip(), _text(usage).strip()
    if not (most.isdigit() and used.isdigit()):
        return None  # no such group, or no limit ("max")
    return max(0, int(most) - int(used) + _table(stat).get(droppable, 0))


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number, as both /proc/meminfo and memory.stat have them."""
    rows = [line.replace(":", " ").split() for line in _text(path).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
