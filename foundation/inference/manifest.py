"""The manifest of a batch: JSON lines that grow as it goes, and a log for people beside them.

    {"event": "run", …}       once a run: versions, model and the SHA-256 of its weights, options
    {"event": "started", …}   before each case
    {"event": "finished", …}  after it: status, SHA-256 of the CT, warnings, doubts, seconds, …
    {"event": "stopped", …}   instead, where a signal or an error ended the run
    {"event": "set aside", …} instead, where the process had died in this case twice in a row

Each line has the time, the run's id and, but for the first, the case's id. A case that was started
and neither finished nor stopped is one in which the process died.

File names and folder names can hold the names of patients. Unless asked for, neither file has any:
a case has an id (`Case.id`), and names and paths are taken out of warnings and errors.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation import __version__
from foundation.errors import UsageError
from foundation.files import append_text, nifti_stem

if TYPE_CHECKING:
    from foundation.inference.cases import Case
    from foundation.inference.outcomes import Outcome
    from foundation.inference.request import Request

NAME = "universal-ct.jsonl"
FORMAT = "universal-ct manifest"
FORMAT_VERSION = 1
_LIBRARIES = ("torch", "numpy", "nibabel", "monai")
# From a slash or a drive letter on; a path with spaces loses at least its beginning.
_PATH = re.compile(r"(?<![\w.>])(?:[A-Za-z]:)?[\\/](?:[^\s'\",;:()]+)")

logger = logging.getLogger("foundation")


def manifest_path(output: str | Path) -> Path | None:
    """Return where the manifest lies by default: in the output folder; beside a file, none."""
    return None if nifti_stem(Path(output)) is not None else Path(output) / NAME


class Manifest:
    """Writes and reads a manifest. That it cannot be written must not cost a result.

    Args:
        path: The JSON lines; the log is called the same, with the suffix .log.
        names: Also write names of cases, their CTs' paths, and messages as they are.

    Raises:
        UsageError: The file is there and is no manifest of ours.
    """

    def __init__(self, path: str | Path, *, names: bool = False) -> None:
        self.path = Path(path)
        self.log = self.path.with_suffix(".log")
        self.names = names
        self.run = uuid.uuid4().hex[:12]
        self._broken = False
        if self.path.suffix == ".log":
            raise UsageError(f"{path} is the name of the log. Give the manifest another, .jsonl.")
        events = self._events()
        first = next(events, None)
        if (
            self.path.exists()
            and self.path.stat().st_size
            and (first or {}).get("format") != FORMAT
        ):
            raise UsageError(
                f"{path} is no manifest of universal-ct. Give --manifest another file."
            )
        self._deaths: Counter[str] = Counter()
        for event in events:
            if event.get("event") == "started":
                self._deaths[str(event.get("case"))] += 1
            elif event.get("event") in ("finished", "stopped"):
                del self._deaths[str(event.get("case"))]

    def deaths(self, case: Case) -> int:
        """Return how many times in a row the process had died in this case, before this run."""
        return self._deaths[case.id]

    def begin(self, request: Request, cases: Sequence[Case], part: str | None) -> None:
        """Note what is to be done.

        Raises:
            OSError: The manifest cannot be written. Later that is a message in the log only.
        """
        options = {**request.options, "classes": request.classes}
        self._write(
            {
                "event": "run",
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "universal_ct": request.universal_ct,
                "python": platform.python_version(),
                "libraries": {name: _version(name) for name in _LIBRARIES},
                "system": f"{platform.system()} {platform.machine()}",
                "model": request.model,
                "model_sha256": request.model_sha256,
                "options": options,
                "part": part,
                "cases": len(cases),
            },
            f"universal-ct {__version__}: {len(cases)} cases{f', part {part}' if part else ''}, "
            f"model {request.model}",
        )

    def started(self, case: Case) -> None:
        """Note that a case is being segmented.

        Raises:
            OSError: The manifest cannot be written.
        """
        self._write({"event": "started", **self._who(case)}, f"{self._called(case)}: started")

    def finished(self, case: Case, outcome: Outcome) -> None:
        """Note what became of a case."""
        cleaned = [self._clean(text, case) for text in outcome.warnings]
        error = None if outcome.error is None else self._clean(outcome.error, case)
        words = [f"{self._called(case)}: {outcome.status} in {outcome.seconds:g} s"]
        words += [f"warning: {text}" for text in cleaned]
        words += [f"error: {error}"] if error else []
        content = {
            "status": outcome.status,
            "ct_sha256": outcome.ct_sha256,
            "warnings": cleaned,
            "doubts": outcome.doubts,
            "seconds": outcome.seconds,
            "peak_memory_mib": outcome.peak_memory_mib,
            "error": error,
        }
        self._try({"event": "finished", **self._who(case), **content}, "; ".join(words))

    def stopped(self, case: Case, why: BaseException) -> None:
        """Note that the run ends within a case, and that the case is not to blame."""
        reason = self._clean(str(why) or type(why).__name__, case)
        content = {"event": "stopped", **self._who(case), "error": reason}
        self._try(content, f"{self._called(case)}: {reason}")

    def set_aside(self, case: Case) -> None:
        """Note that a case is left out, since the process died in it."""
        self._try({"event": "set aside", **self._who(case)}, f"{self._called(case)}: set aside")

    def _events(self) -> Iterator[dict[str, Any]]:
        """The lines that are there; one that a kill has cut is left out."""
        with (
            suppress(FileNotFoundError),
            self.path.open(encoding="utf-8", errors="replace") as file,
        ):
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    event = {}
                yield event if isinstance(event, dict) else {}

    def _who(self, case: Case) -> dict[str, str]:
        names = {"name": case.name, "ct": str(case.ct)} if self.names else {}
        return {"case": case.id, **names}

    def _called(self, case: Case) -> str:
        return f"{case.id} {case.name}" if self.names else case.id

    def _clean(self, text: str, case: Case) -> str:
        return text if self.names else without_names(text, case)

    def _write(self, content: dict[str, Any], words: str) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = json.dumps({"time": now, "run": self.run, **content})
        append_text(self.path, line + "\n")
        words = words.replace("\n", " ")
        append_text(self.log, f"{now} {self.run} {words}\n", sync=False)

    def _try(self, content: dict[str, Any], words: str) -> None:
        try:
            self._write(content, words)
        except OSError as error:
            if not self._broken:  # once is enough
                logger.error("error: The manifest cannot be written any more: %s", error)
            self._broken = True


def without_names(text: str, case: Case) -> str:
    """Take out of a message what can name a patient: paths, and the names of files and folders.

    Args:
        text: The message.
        case: What it is about.

    Returns:
        The message with <ct>, <output>, <case> and <path> in the place of names.
    """
    ct, output = case.ct, case.output
    known = {str(folder): "<folder>" for folder in (*ct.parents, *output.parents)}
    known |= {str(ct): "<ct>", str(ct.absolute()): "<ct>", str(output): "<output>"}
    with suppress(OSError, RuntimeError):  # a circle of links
        known[str(ct.resolve())] = "<ct>"
    known |= {str(output.absolute()): "<output>", ct.name: "<ct>", output.name: "<output>"}
    stem = nifti_stem(ct)
    known |= {case.name: "<case>", **({stem: "<case>"} if stem else {})}
    found = [re.escape(name) for name in sorted(known, key=len, reverse=True) if name.strip("./\\")]
    # Not within a word, or a case that is called "a" would leave no word whole.
    pattern = rf"(?<!\w)(?:{'|'.join(found)})(?!\w)"
    return _PATH.sub("<path>", re.sub(pattern, lambda name: known[name.group()], text))


def peak_memory_mib() -> float | None:
    """Return the most memory that this process has had, in MiB; None where it is not known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
