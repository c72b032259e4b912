"""What a run gave, as one line of JSON: the only source of every figure that is published.

    record = new_record("table1_prompts", "mini", arm={"text": "one-hot"}, seed=0,
                        figures=[Figure("dice/mean", 0.61)], seconds=412.0,
                        data={"world": path_sha256(world)}, weights={})
    append_record("benchmarks/records/table1_prompts.jsonl", record)

Tables, cards and `model-index` are rendered from such lines; see `foundation.evaluation.tables`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from foundation.errors import UsageError
from foundation.settings import did_you_mean, read

FORMAT_VERSION = 1
Size = Literal["smoke", "mini", "real"]
SIZES: tuple[str, ...] = get_args(Size)
_HASH = re.compile(r"[0-9a-f]{64}")
_CHECKOUT = Path(__file__).parents[2]
# What decides about a figure; records and tables change with every run.
_CODE = ("foundation", "benchmarks", "finetune", ":!*.jsonl", ":!*.md", ":!*/.eval_results/*")


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        name: What it is, from the general to the special: "dice/liver", "auc/liver_tumor",
            "seconds".
        value: None where it cannot be given, as Dice of a class that no scan shows.
        unit: "", "s", "MiB", "mm", "ml", "%", …
        low: Lower end of the 95 % interval.
        high: Upper end of it.
        n: From how many scans; of a speed or a memory, from how many measurements.
    """

    name: str
    value: float | None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise UsageError("a figure needs a name, such as 'dice/liver'.")
        if any(x is not None and not math.isfinite(x) for x in (self.value, self.low, self.high)):
            raise UsageError(f"the figure {self.name!r} is not finite. Give None for no value.")
        if (self.low is None) != (self.high is None):
            raise UsageError(f"the figure {self.name!r} has one end of an interval. Give both.")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise UsageError(
                f"the interval of {self.name!r} is {self.low} to {self.high}. Give the lower first."
            )


@dataclass(frozen=True)
class Record:
    """What one run of one arm gave.

    Attributes:
        benchmark: Name of the script that measured, such as "table1_prompts".
        size: "smoke", "mini" or "real".
        arm: What is varied, such as {"text": "one-hot"}.
        seed: None where nothing is drawn.
        command: What runs it again.
        figures: What was measured. No two have one name.
        data: Name → SHA-256 of what was trained or measured on; empty where it was not recorded.
        weights: Name → SHA-256 of what was started from or measured; empty for random weights.
        machine: See `describe_machine`.
        date: Of the run, as 2026-11-26.
        commit: See `git_commit`; empty where it was not recorded.
        versions: Name of a library → version.
        seconds: That the run took; None where they were not recorded.
        note: What a reader must know, such as where an older figure was transcribed from.
    """

    benchmark: str
    size: Size
    arm: Mapping[str, str | int | float]
    seed: int | None
    command: str
    figures: tuple[Figure, ...]
    data: Mapping[str, str]
    weights: Mapping[str, str]
    machine: str
    date: str
    commit: str
    versions: Mapping[str, str]
    seconds: float | None
    note: str = ""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UsageError(f"size is {self.size!r}. Choose from {', '.join(SIZES)}.")
        names = [figure.name for figure in self.figures]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"a record has the figure {twice[0]!r} twice. Names must differ.")
        for name, digest in {**self.data, **self.weights}.items():
            if not _HASH.fullmatch(digest):
                raise UsageError(
                    f"the hash of {name!r} is {digest!r}; expected the 64 digits of a SHA-256, as "
                    "path_sha256 gives them."
                )
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError as wrong:
            raise UsageError(f"date is {self.date!r}; expected one like 2026-11-26.") from wrong

    def figure(self, name: str) -> Figure:
        """Return the figure of this name.

        Raises:
            UsageError: The record has none.
        """
        figures = {figure.name: figure for figure in self.figures}
        if name not in figures:
            raise UsageError(
                f"The record of {self.benchmark} has no figure {name!r}."
                f"{did_you_mean(name, figures)} It has: {', '.join(figures)}."
            )
        return figures[name]

    def to_json(self) -> str:
        """Return the record as one line of JSON, without the end of the line."""
        values = asdict(self)
        values["figures"] = [
            {key: value for key, value in asdict(figure).items() if value not in ("", None)}
            | {"value": figure.value}
            for figure in self.figures
        ]
        return json.dumps(
            {"format_version": FORMAT_VERSION, **values}, ensure_ascii=False, allow_nan=False
        )


def new_record(
    benchmark: str,
    size: Size,
    *,
    figures: Iterable[Figure],
    seconds: float,
    arm: Mapping[str, str | int | float] | None = None,
    seed: int | None = None,
    data: Mapping[str, str] | None = None,
    weights: Mapping[str, str] | None = None,
    command: str | None = None,
    note: str = "",
) -> Record:
    """Make the record of a run that has just ended here: machine, date, commit and versions too.

    Args:
        benchmark: Name of the script.
        size: "smoke", "mini" or "real".
        figures: What was measured.
        seconds: That the run took.
        arm: What is varied.
        seed: None where nothing is drawn.
        data: Name → SHA-256 of what was trained or measured on (`path_sha256`).
        weights: Name → SHA-256 of what was started from or measured; {} for random weights.
        command: What runs it again; `command_line()` if not given.
        note: What a reader must know.
    """
    return Record(
        benchmark=benchmark,
        size=size,
        arm=dict(arm or {}),
        seed=seed,
        command=command_line() if command is None else command,
        figures=tuple(figures),
        data=dict(data or {}),
        weights=dict(weights or {}),
        machine=describe_machine(),
        date=datetime.date.today().isoformat(),
        commit=git_commit(),
        versions=versions(),
        seconds=round(seconds, 3),
        note=note,
    )


# --- files of records -----------------------------------------------------------------------------


def append_record(path: str | os.PathLike[str], record: Record) -> None:
    """Add a record at the end of a file, as a whole line.

    The line is written by one call and is on the disk when this returns. What a killed process may
    have left of a line is removed by the next one.

    Args:
        path: The file, `*.jsonl`. Missing parent folders are made, as is the file.
        record: What to add.

    Raises:
        UsageError: The file holds lines that are no records.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = f"{record.to_json()}\n"
    if path.is_file():
        read_records(path)  # nobody's other file is added to
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if _is_json(content[whole:]):
            line = f"\n{line}" if content[whole:] else line
        else:
            os.truncate(path, whole)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, line.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read a file of records, strictly; only a last line that a killed process left is passed over.

    Args:
        path: The file, `*.jsonl`.

    Returns:
        The records in the order of their lines.

    Raises:
        UsageError: The file cannot be read, or a line is no record. The message names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as wrong:
        raise UsageError(f"The records {path} cannot be read: {wrong}") from wrong
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == len(lines) and not _is_json(line.encode())):
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as wrong:
            raise UsageError(f"{where}: no JSON: {wrong}. A record is one line.") from wrong
        records.append(read(Record, values, where, version=FORMAT_VERSION))
    return records


def _is_json(text: bytes) -> bool:
    """Whether it is nothing, or one whole value."""
    try:
        return not text or json.loads(text) is not None
    except ValueError:
        return False


def add_record_option(parser: argparse.ArgumentParser) -> None:
    """Add --record FILE to a script that measures."""
    text = "append the record of this run to a file *.jsonl, such as benchmarks/records/NAME.jsonl"
    parser.add_argument("--record", type=Path, metavar="FILE", help=text)


# --- where and with what --------------------------------------------------------------------------


def command_line(argv: Sequence[str] | None = None) -> str:
    """Return the command of this process, as it would be typed in the checkout.

    Absolute paths name a machine and not the data, so only their ends are kept: of a folder its
    name, of a file its folder's name too. Where the record was written (`--record`) is left out.

    Args:
        argv: The script and its arguments; those of the process if not given.
    """
    script, *words = sys.argv if argv is None else argv
    if "--record" in words:
        at = words.index("--record")
        words = [*words[:at], *words[at + 2 :]]
    words = [word for word in words if not word.startswith("--record=")]
    path = Path(script)
    if path.is_absolute() and path.is_relative_to(_CHECKOUT):
        path = path.relative_to(_CHECKOUT)
    elif path.is_absolute():
        path = Path(path.parent.name, path.name)
    start = [path.name] if path.suffix != ".py" else ["python", path.as_posix()]
    return shlex.join([*start, *map(_shortened, words)])


def _shortened(word: str) -> str:
    key, equals, value = word.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return word
    # Without a suffix it is a folder, also where it does not exist yet.
    short = path.name if path.is_dir() or not path.suffix else f"{path.parent.name}/{path.name}"
    return f"{key}{equals}{short}"


def describe_machine() -> str:
    """Describe the processor and the accelerators of this machine; never its name."""
    import torch

    from foundation.hardware import computes_bfloat16

    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    parts = [f"{platform.machine()} CPU, {count} {'core' if count == 1 else 'cores'}"]
    threads = torch.get_num_threads()
    if threads < count:
        parts.append(f"{threads} {'thread' if threads == 1 else 'threads'}")
    if computes_bfloat16("cpu"):
        parts.append("AVX-512 BF16")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        parts += [f"{names.count(name)} × {name}" for name in dict.fromkeys(names)]
    return ", ".join(parts)


def git_commit() -> str:
    """Return the commit of the code that runs, with a "+" where the code was changed since.

    Returns:
        40 digits, or 40 and "+". Empty outside of a checkout of universal-ct. Changed records and
        texts do not count as changed code.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(_CHECKOUT), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        # An installed package may lie within another project's repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _CHECKOUT.resolve():
            return ""
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--", *_CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of what computes."""
    from foundation import __version__

    found: dict[str, Any] = {"python": platform.python_version(), "universal-ct": __version__}
    for name in ("torch", "monai", "numpy"):
        found[name] = importlib.metadata.version(name)
    return found
