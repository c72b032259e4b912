"""Several tunings of the same classes on the same scans, side by side: one page and a CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from foundation.evaluation.changes import FORGOTTEN, with_mean
from foundation.evaluation.html import document, number, section, signed
from foundation.files import replacing
from foundation.imaging.legend import display_name

PAGE, TABLE = "comparison.html", "comparison.csv"
Summary = Mapping[str, Any]  # what `Tuned.summary` returns


def write_comparison(
    folder: str | Path, summaries: Mapping[str, Summary], notes: Sequence[str] = ()
) -> Path:
    """Write comparison.html and comparison.csv into a folder.

    Args:
        folder: Missing folders are made.
        summaries: Name of the run → `Tuned.summary()`, which may have been read from JSON.
        notes: Sentences below the heading of the page.

    Returns:
        The path of the page.
    """
    folder = Path(folder)
    new, old = _classes(summaries, "new"), _classes(summaries, "old")
    with (
        replacing(folder / TABLE) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        columns = [f"{name} {part}" for part in ("before", "after") for name in summaries]
        table.writerow(["class", "group", *columns])
        for group, names in (("new", new), ("old", old)):
            for title, chosen in _rows(group, names):
                cells = [
                    _mean(s, chosen, p) for p in ("before", "after") for s in summaries.values()
                ]
                texts = ["" if value is None else f"{value:.4f}" for value in cells]
                table.writerow([title, group, *texts])
    parts = [
        "".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        section("What each learnt and forgot: mean Dice", _overview(summaries, new, old)),
        section("New classes, after", _by_class(summaries, _rows("new", new))),
        section(
            "Old classes, after; before in the first column",
            _by_class(summaries, _rows("old", old), "before")
            if old
            else "<p>The scans that were measured label none.</p>",
        ),
    ]
    with replacing(folder / PAGE) as temporary:
        temporary.write_text(document("Methods side by side", parts), encoding="utf-8")
    return folder / PAGE


def _classes(summaries: Mapping[str, Summary], group: str) -> list[str]:
    found = (name for each in summaries.values() for name in each[group] if name in each["dice"])
    return list(dict.fromkeys(found))


def _rows(group: str, names: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    return with_mean(names, f"mean of {len(names)} {group} classes", display_name)


def _mean(summary: Summary, names: Iterable[str], part: str) -> float | None:
    values = [summary["dice"].get(name, {}).get(part) for name in names]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _overview(summaries: Mapping[str, Summary], new: Sequence[str], old: Sequence[str]) -> str:
    rows = ""
    for name, each in summaries.items():
        values = [_mean(each, group, p) for group in (new, old) for p in ("before", "after")]
        fall = None if values[2] is None or values[3] is None else values[3] - values[2]
        kind = "forgot" if fall is not None and fall < -FORGOTTEN - 1e-9 else ""
        cells = "".join(f"<td>{number(value)}</td>" for value in values)
        rows += f'<tr class="{kind}"><td>{escape(name)}</td>{cells}<td>{signed(fall)}</td></tr>'
    heads = "".join(f"<th>{g} before</th><th>after</th>" for g in ("New", "Old"))
    marked = f"<p class='note'>Marked: the mean of old classes fell by more than {FORGOTTEN:g}.</p>"
    return f"<table><tr><th>Run</th>{heads}<th>change</th></tr>{rows}</table>{marked}"


def _by_class(
    summaries: Mapping[str, Summary],
    rows: Sequence[tuple[str, Sequence[str]]],
    first: str | None = None,
) -> str:
    """A column a run; `first` is the heading of one more, with what the first run had before."""
    columns = ([first] if first else []) + [*summaries]
    heads = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = ""
    for title, names in rows:
        values = [_mean(each, names, "after") for each in summaries.values()]
        if first:
            values.insert(0, _mean(next(iter(summaries.values())), names, "before"))
        cells = "".join(f"<td>{number(value)}</td>" for value in values)
        kind = "mean" if len(names) > 1 else ""
        body += f'<tr class="{kind}"><td>{escape(title)}</td>{cells}</tr>'
    return f"<table><tr><th>Class</th>{heads}</tr>{body}</table>"
