"""The paper's own numbers, from `benchmarks/paper.yaml`, each with how well it is known.

for row in paper("table2_msd", Path(__file__).with_name("paper.yaml")).rows:
    print(row.arm, row.figures, row.grade)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from foundation.errors import UsageError
from foundation.settings import did_you_mean, read, read_file

Grade = Literal["E", "2", "D", "U"]
GRADES: Mapping[str, str] = {
    "E": "exact, read from an author's own text or file",
    "2": "second-hand",
    "D": "derived from exact facts",
    "U": "unknown",
}


@dataclass(frozen=True)
class PaperRow:
    """Numbers of one row of a table, all known equally well.

    Attributes:
        arm: What the row is about, with the keys of our records, such as {"method": "nnU-Net"}.
        figures: Name → value; None where it is unknown. Names are those of our records' figures.
        grade: A key of GRADES. "U" exactly where a value is None.
        note: What a reader must know.
    """

    arm: Mapping[str, str]
    figures: Mapping[str, float | None]
    grade: Grade
    note: str = ""

    def __post_init__(self) -> None:
        unknown = [name for name, value in self.figures.items() if value is None]
        if (self.grade == "U") != bool(unknown) or (unknown and len(unknown) < len(self.figures)):
            raise UsageError(
                f"the row {dict(self.arm)} of grade {self.grade} holds {dict(self.figures)}; "
                "unknown values (null) and no others have the grade U. Make two rows of it."
            )


@dataclass(frozen=True)
class PaperTable:
    """A table or figure of the paper.

    Attributes:
        title: What it shows.
        unit: Of all values, such as "%" or "GFLOPs".
        rows: In the paper's order.
        note: What a reader must know.
    """

    title: str
    unit: str
    rows: tuple[PaperRow, ...]
    note: str = ""


@dataclass(frozen=True)
class _Paper:
    source: str
    tables: Mapping[str, PaperTable]


def paper(table: str, path: str | os.PathLike[str]) -> PaperTable:
    """Read the paper's numbers that a benchmark is set beside.

    Args:
        table: The benchmark's name, such as "table2_msd".
        path: Of `benchmarks/paper.yaml`.

    Raises:
        UsageError: There is no such table, or the file is not right.
    """
    tables = read(_Paper, read_file(path), str(path)).tables
    if table not in tables:
        raise UsageError(
            f"{path} has no table {table!r}.{did_you_mean(table, tables)} It has: "
            f"{', '.join(tables)}."
        )
    return tables[table]
