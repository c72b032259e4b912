"""Markdown tables from records, and the blocks of a text that they fill.

A block stands between `<!-- records: NAME -->` and `<!-- end records -->`; a YAML file of that NAME
says what the table shows. Its cells are templates:

    kind: arms                         # a row for each arm; seeds are averaged
    records: [benchmarks/records/fewshot.jsonl]
    where: {size: mini}
    columns: {weights: "{arm.start}", Dice: "{dice/mean:3}", run: "`{command}`, {date}"}

A name in braces is a figure, `arm.KEY`, `versions.LIBRARY`, or a field of the record. After a colon
stands how a number is written: `3` digits, `%0` in percent, `+3` with its sign. A figure of one
record comes with its interval, a figure of several as mean ± standard deviation.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from foundation.errors import UsageError
from foundation.evaluation.paper import GRADES, PaperTable, paper
from foundation.evaluation.records import Figure, Record, read_records
from foundation.settings import did_you_mean, read, read_file

# On lines of their own: a text that explains them is no block.
BEGIN = re.compile(r"^<!-- records: (\S+) -->$", re.MULTILINE)
END = re.compile(r"^<!-- end records -->$", re.MULTILINE)
_NAME = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")
_SPEC = re.compile(r"([%+]?)(\d?)")
_EVERY = "*"  # stands for a class: "dice/*"; in `where`, for any value
_PLAIN = {each.name for each in fields(Record)} - {"figures", "arm", "data", "weights", "versions"}
Where = Mapping[str, str | int | float | None]


@dataclass(frozen=True)
class Row:
    """A row that is written out.

    Attributes:
        cells: Templates, one for each column.
        where: Which of the table's records it is about, beside the table's own `where`.
    """

    cells: tuple[str, ...]
    where: Where = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """What a block shows.

    Attributes:
        kind: "arms": a row for each arm. "runs": a row for each record. "rows": those of `rows`.
            "classes": a row for each class that a record has figures of; templates have * in its
            place, as `{dice/*:3}`; with `across`, `cell` is the template, and a column is an arm.
            "pivot": a row for each value of `down`, a column for values of
            `across`, with `cell` in them. "paper": the rows of a table of the paper, then one for
            each arm.
        records: Files of records, from the root of the checkout.
        where: Which records: a field or `arm.KEY` → the value that it must have; null for none,
            "*" for any.
        columns: Head of each column → template. Of "rows", whose templates stand in `rows`, → "".
            With `across` → its value in this column; of the first column, which shows `down` or
            the class, → "".
        rows: Of the kind "rows".
        down: Of a "pivot": a field or arm.KEY.
        across: Of a "pivot" or of "classes": another one.
        cell: With `across`: a template.
        paper: Name of the paper's table, of the kind "paper". A column may show `{source}`: the
            paper with the grade, or ours.
        latest: A field or arm.KEY: only the last record of each of its values counts, as it
            replaces those before.
        skip: "classes" that get no row, such as "mean".
        none: What stands where a record has the figure, but no value.
        before: Lines above the table, a template.
        after: Lines below it, a template.
    """

    kind: Literal["arms", "runs", "rows", "classes", "pivot", "paper"]
    columns: Mapping[str, str]
    records: tuple[str, ...] = ()
    where: Where = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    down: str = ""
    across: str = ""
    cell: str = ""
    paper: str = ""
    latest: str = ""
    skip: tuple[str, ...] = ()
    none: str = "–"
    before: str = ""
    after: str = ""


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read what a block shows.

    Args:
        path: A YAML file.

    Raises:
        UsageError: It is not right.
    """
    return read(Table, read_file(path), str(path))


def render_blocks(text: str, content: Callable[[str], str], where: str = "The text") -> str:
    """Fill the blocks of a text.

    Args:
        text: Markdown.
        content: Name of a block → the Markdown within.
        where: What errors begin with, such as the file's path.

    Raises:
        UsageError: A block has no end, or an end no beginning.
    """
    parts, place = [], 0
    for head in BEGIN.finditer(text):
        between = text[place : head.start()]
        end = END.search(text, head.end())
        following = BEGIN.search(text, head.end())
        if end is None or (following is not None and following.start() < end.start()):
            raise UsageError(f"{where}: the block {head[0]} has no end. Close it below the table.")
        parts += [between, head[0], "\n", content(head[1]).strip(), "\n", end[0]]
        place = end.end()
    parts.append(text[place:])
    if len(END.findall(text)) != len(BEGIN.findall(text)):
        raise UsageError(f"{where}: the end of a block stands there without its beginning.")
    return "".join(parts)


def render_table(table: Table, root: str | os.PathLike[str]) -> str:
    """Write a table as Markdown.

    Args:
        table: What it shows.
        root: Of the checkout, in which its files of records and the paper's numbers lie.

    Raises:
        UsageError: A file cannot be read, no record is meant, or a template names what no record
            has.
    """
    root = Path(root)
    theirs = paper(table.paper, root / "benchmarks" / "paper.yaml") if table.paper else None
    records = [record for name in table.records for record in read_records(root / name)]
    return render_records(table, records, theirs)


def render_records(
    table: Table, records: Sequence[Record], theirs: PaperTable | None = None
) -> str:
    """Write a table as Markdown, of records that were read already.

    Args:
        table: What it shows; its files are not read.
        records: Among these, `table.where` chooses.
        theirs: The paper's numbers, for the kind "paper".

    Raises:
        UsageError: No record is meant, or a template names what none has.
    """
    if (table.kind == "paper") != (theirs is not None):
        raise UsageError("`paper`, the name of a table of the paper, is for the kind paper alone.")
    found = [record for record in records if _meant(record, table.where)]
    if table.latest:
        found = list({_field(record, table.latest): record for record in found}.values())
    if not found and theirs is None:
        raise UsageError(
            f"No record of {', '.join(table.records) or 'those given'} has {dict(table.where)}. "
            "Run the benchmark, or change `where`."
        )
    lines = {
        "arms": _arms,
        "runs": _runs,
        "rows": _rows,
        "classes": _classes,
        "pivot": _pivot,
    }
    _check_names(table, found, theirs)
    if theirs is not None:
        body = [*_paper(table, theirs), *_arms(table, found, scale=theirs.unit == "%")]
    else:
        body = list(lines[table.kind](table, found))
    heads = list(table.columns)
    drawn = [heads, ["-"] * len(heads), *body]
    text = ["| " + " | ".join(cells) + " |" for cells in drawn]
    text[1] = "|" + "-|" * len(heads)
    look = _of_records(found, table.none)
    above, below = [_fill(text.strip(), look) for text in (table.before, table.after)]
    return "\n".join(
        [*([above, ""] if above else []), *text, *(["", below] if below else [])],
    )


# --- one function for each kind -------------------------------------------------------------------


def _arms(table: Table, found: Sequence[Record], scale: bool = False) -> Iterator[list[str]]:
    """A row for each arm, in the order in which the arms first appear."""
    groups: dict[object, list[Record]] = {}
    for record in found:
        groups.setdefault(_key(record), []).append(record)
    for group in groups.values():
        look = _of_records(group, table.none, 100.0 if scale else 1.0)
        sizes = dict.fromkeys(record.size for record in group)
        yield [
            _fill(cell, look, source=f"measured here ({', '.join(sizes)})")
            for cell in table.columns.values()
        ]


def _runs(table: Table, found: Sequence[Record]) -> Iterator[list[str]]:
    """A row for each record, in the order of the file."""
    for record in found:
        look = _of_records([record], table.none)
        yield [_fill(cell, look) for cell in table.columns.values()]


def _pivot(table: Table, found: Sequence[Record]) -> Iterator[list[str]]:
    """A row for each value of `down`; empty where nothing was measured."""
    values = list(table.columns.values())[1:]
    for down in dict.fromkeys(_field(record, table.down) for record in found):
        cells = []
        for value in values:
            where = {table.down: down}
            group = [r for r in found if _meant(r, where) and str(_field(r, table.across)) == value]
            cells.append(_fill(table.cell, _of_records(group, table.none)) if group else "")
        yield [str(down), *cells]


def _rows(table: Table, found: Sequence[Record]) -> Iterator[list[str]]:
    """The rows that are written out."""
    for row in table.rows:
        if len(row.cells) != len(table.columns):
            raise UsageError(
                f"The row {row.cells[0]!r} has {len(row.cells)} cells, the table "
                f"{len(table.columns)} columns. Give a cell for each column."
            )
        group = [record for record in found if _meant(record, row.where)]
        yield [_fill(cell, _of_records(group, table.none)) for cell in row.cells]


def _classes(table: Table, found: Sequence[Record]) -> Iterator[list[str]]:
    """A row for each class, in the order of the figures."""
    templates = [table.cell] if table.across else list(table.columns.values())
    named = [name for cell in templates for name, _ in _names(cell) if _EVERY in name]
    if not named:
        raise UsageError("A table of classes needs a template such as '{dice/*:3}'.")
    prefix = named[0].partition(_EVERY)[0]
    names = dict.fromkeys(
        figure.name.removeprefix(prefix)
        for record in found
        for figure in record.figures
        if figure.name.startswith(prefix)
    )
    # Template and records of each column.
    columns = [(cell, found) for cell in templates]
    if table.across:
        columns = [
            (table.cell, [r for r in found if str(_field(r, table.across)) == value])
            for value in list(table.columns.values())[1:]
        ]
    for name in names:
        if name in table.skip:
            continue
        cells = [
            _fill(
                cell.replace(f"{{{_EVERY}}}", name).replace(_EVERY, name),
                _of_records(group, table.none),
            )
            for cell, group in columns
        ]
        yield [name, *cells] if table.across else cells


def _paper(table: Table, theirs: PaperTable) -> Iterator[list[str]]:
    """The paper's rows. What it does not report of a row stays empty; what is unknown says so.

    A row that reports nothing of what the table shows is left out.
    """
    shown = {match[1] for cell in table.columns.values() for match in _NAME.finditer(cell)}
    for row in theirs.rows:
        if shown.isdisjoint(row.figures):
            continue

        def look(name: str, row: object = row) -> _Found:
            assert isinstance(row, type(theirs.rows[0]))
            if name.startswith("arm."):
                return row.arm.get(name.removeprefix("arm."), "")
            if name not in row.figures:
                return ""
            value = row.figures[name]
            return "unknown" if value is None else _Measured([Figure(name, value)])

        source = f"paper ({row.grade}: {GRADES[row.grade]})"
        yield [_fill(cell, look, source=source) for cell in table.columns.values()]


# --- templates ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """Figures of one name, and what they are several of."""

    figures: list[Figure]
    of: str = "seeds"


_Found = str | _Measured
_Look = Callable[[str], _Found]


def _fill(template: str, look: _Look, source: str = "") -> str:
    """Put what is looked up into a template."""

    def found(match: re.Match[str]) -> str:
        name, spec = match[1], match[2] or ""
        value = source if name == "source" else look(name)
        return value if isinstance(value, str) else written(value.figures, spec, value.of)

    return _NAME.sub(found, template)


def _of_records(group: Sequence[Record], none: str, factor: float = 1.0) -> _Look:
    """Look names up in records of one arm."""

    def look(name: str) -> _Found:
        figures = [f for record in group for f in record.figures if f.name == name]
        if figures:
            known = [_scaled(figure, factor) for figure in figures if figure.value is not None]
            if len({_key(record) for record in group if _has(record, name)}) > 1:
                known = list(dict.fromkeys(known))  # of several arms: only where all agree
                if len(known) > 1:
                    raise UsageError(
                        f"{name!r} has several values in different arms: which is meant? Narrow "
                        "`where`, or make it a column of a table of arms."
                    )
            seeds = {record.seed for record in group if _has(record, name)}
            return _Measured(known, "seeds" if len(seeds) > 1 else "runs") if known else none
        values = [_field(record, name) for record in group]
        return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))

    return look


def _check_names(table: Table, found: Sequence[Record], theirs: PaperTable | None) -> None:
    """Refuse a template that names what nothing has: a misspelt name would be an empty cell."""
    cells = [*table.columns.values(), *(cell for row in table.rows for cell in row.cells)]
    cells.append(table.cell)
    known = {figure.name for record in found for figure in record.figures}
    known |= {name for row in theirs.rows for name in row.figures} if theirs else set()
    for name in (name for cell in [*cells, table.before, table.after] for name, _ in _names(cell)):
        like = re.compile(re.escape(name).replace(r"\*", ".+"))
        if not _is_field(name) and not any(like.fullmatch(each) for each in known):
            raise UsageError(
                f"No record has {name!r}.{did_you_mean(name, known | _PLAIN)} Name a figure, "
                f"arm.KEY, versions.LIBRARY, or one of {', '.join(sorted(_PLAIN))}."
            )


def _names(template: str) -> list[tuple[str, str]]:
    return [match for match in _NAME.findall(template) if match[0] != _EVERY]


def _has(record: Record, name: str) -> bool:
    return any(figure.name == name for figure in record.figures)


def _is_field(name: str) -> bool:
    return name in _PLAIN or name == "source" or name.startswith(("arm.", "versions."))


def _field(record: Record, name: str) -> str | int | float | None:
    key, _, inner = name.partition(".")
    if inner and key in ("arm", "versions"):
        values: Mapping[str, str | int | float] = getattr(record, key)
        return values.get(inner)
    value: str | int | float | None = getattr(record, name) if name in _PLAIN else None
    return value


def _scaled(figure: Figure, factor: float) -> Figure:
    """Dice in percent, beside the paper's."""
    if factor == 1.0 or figure.unit or figure.value is None:
        return figure
    ends = [None if end is None else end * factor for end in (figure.low, figure.high)]
    return replace(figure, value=figure.value * factor, low=ends[0], high=ends[1])


def _meant(record: Record, where: Where) -> bool:
    found = {name: _field(record, name) for name in where}
    return all(
        found[name] is not None if value == _EVERY else found[name] == value
        for name, value in where.items()
    )


def _key(record: Record) -> tuple[object, ...]:
    return (record.benchmark, record.size, *sorted(record.arm.items()))


def written(figures: Sequence[Figure], spec: str = "", of: str = "seeds") -> str:
    """Write a figure of one run, or of several seeds, for a table.

    Args:
        figures: Of one name; at least one has a value. Those without are left out.
        spec: How a number is written: "3" digits after the point, "%0" in percent, "+3" with its
            sign; empty: as short as it can be.
        of: What several figures differ in: "seeds" or "runs".

    Returns:
        "0.913", "0.913 [0.900, 0.921]" with an interval, "0.91 ± 0.02 (3 seeds)" over several.

    Raises:
        UsageError: `spec` is another.
    """
    known = [figure for figure in figures if figure.value is not None]
    values = [figure.value for figure in known if figure.value is not None]
    if len(values) > 1:
        mean, spread = statistics.fmean(values), statistics.stdev(values)
        sigma = number(spread, spec.replace("+", ""))
        return f"{number(mean, spec)} ± {sigma} ({len(values)} {of})"
    low, high = known[0].low, known[0].high
    if low is None or high is None:
        return number(values[0], spec)
    return f"{number(values[0], spec)} [{number(low, spec)}, {number(high, spec)}]"


def number(value: float, spec: str = "") -> str:
    """Write a number as `written` does."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UsageError(f"A number cannot be written as {spec!r}: give 3, %0, +3 or nothing.")
    mark, digits = match.groups()
    value = value * 100 if mark == "%" else value
    text = f"{value:.{digits}f}" if digits else f"{value:g}"
    if float(text) == 0 and mark == "+":
        return "0"
    sign = "+" if mark == "+" and value > 0 else ""
    return f"{sign}{text.replace('-', '−')}{' %' if mark == '%' else ''}"
