"""What became of each CT of a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["done", "skipped", "claimed", "failed"]
STATUSES: tuple[Status, ...] = ("done", "skipped", "claimed", "failed")


@dataclass(frozen=True)
class Outcome:
    """What became of one CT.

    Attributes:
        case: Name of the case.
        ct: Path of the CT.
        status: "done"; "skipped", where the same result was there; "claimed", where another process
            has it in work; "failed".
        files: What was written.
        volumes_ml: Class name → millilitres, 0.0 where it was not found.
        truncated: Classes that reach the border of the scan.
        warnings: Doubts about the CT or the result, in sentences.
        doubts: Class name → what is unusual about its mask, in words.
        seconds: From reading the CT to the last file.
        error: What went wrong, where it failed.
        ct_sha256: Of the CT's file, where it was read.
        peak_memory_mib: The most memory that the process has had until then, in MiB.
    """

    case: str
    ct: str
    status: Status
    files: list[str] = field(default_factory=list)
    volumes_ml: dict[str, float] = field(default_factory=dict)
    truncated: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    doubts: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    ct_sha256: str | None = None
    peak_memory_mib: float | None = None


def count(outcomes: Iterable[Outcome]) -> dict[Status, int]:
    """Count outcomes by status; one that no CT has is left out, but for "done" and "failed"."""
    found = Counter(each.status for each in outcomes)
    return {each: found[each] for each in STATUSES if found[each] or each in ("done", "failed")}


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """Return 0 where none failed, 3 where some failed, 1 where all did."""
    failed = {each.status == "failed" for each in outcomes}
    return 0 if True not in failed else 3 if False in failed else 1
