"""Scans that a CSV table lists: columns image, label, class; value and split where needed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foundation.data.cases import Case, Structure, safe_id
from foundation.data.layouts import Survey, read_csv
from foundation.errors import UsageError, listed
from foundation.files import nifti_stem


@dataclass(frozen=True)
class Table:
    """The cases of a table, which are known before their folder is looked at.

    Attributes:
        root: The folder that holds the table and all of its files.
        cases: One for each image.
    """

    root: Path
    cases: tuple[Case, ...]
    expected: str = field(default="the files of the table", init=False)

    def survey(self, root: Path) -> Survey:
        """Return the table's cases.

        Args:
            root: Not looked at: the table names its files.

        Returns:
            The cases in natural order of their ids.
        """
        return Survey(list(self.cases)).sort()


def read_table(path: Path) -> Table:
    """Read a table, whose paths are relative to it.

    Args:
        path: A CSV file.

    Returns:
        Its cases, all files of which exist.

    Raises:
        UsageError: A column or a file is missing, or a line is wrong; names the line.
    """
    by_image: dict[Path, list[tuple[Structure, str | None]]] = {}
    for image, structure, split in _lines(path):
        by_image.setdefault(image, []).append((structure, split))
    ids = _unique_ids(list(by_image))
    cases = tuple(
        Case(
            ids[image],
            image,
            tuple(dict.fromkeys(structure.path for structure, _ in lines)),
            split=next((split for _, split in lines if split), None),
            named=tuple(structure for structure, _ in lines),
        )
        for image, lines in by_image.items()
    )
    files = [file for case in cases for file in (*case.labels, *by_image)]
    root = os.path.commonpath([each.absolute() for each in (path.parent, *files)])
    return Table(Path(root), cases)


def _lines(path: Path) -> Iterator[tuple[Path, Structure, str | None]]:
    """Give image, structure and split of each line, files checked."""
    columns, lines = read_csv(path)
    if not {"image", "label", "class"} <= set(columns):
        raise UsageError(
            f"{path} has the columns {listed(columns) or 'none'}; it needs image, label and class, "
            "and may have value and split."
        )
    if not lines:
        raise UsageError(f"{path} has no line besides its columns.")
    for number, cells in enumerate(lines, start=2):
        where = f"{path}, line {number}"
        files = [(path.parent / cells[key]).absolute() for key in ("image", "label")]
        for key, file in zip(("image", "label"), files, strict=True):
            if not cells[key] or not file.exists():
                raise UsageError(f"{where}: {key} {cells[key]!r} does not exist beside the table.")
        if not cells["class"]:
            raise UsageError(f"{where}: class is empty; name what the label is of.")
        value = cells.get("value", "")
        if value and not value.isdigit():
            raise UsageError(f"{where}: value is {value!r}; give a whole number, or nothing.")
        structure = Structure(files[1], cells["class"], int(value) if value else None)
        yield files[0], structure, cells.get("split") or None


def _unique_ids(images: Sequence[Path]) -> dict[Path, str]:
    """A case's name: its file's, with those of folders before it as far as they differ."""
    for depth in range(1, 22):
        names = {
            image: safe_id("_".join((*image.parts[-depth:-1], nifti_stem(image) or image.name)))
            for image in images
        }
        if max(Counter(names.values()).values()) == 1:
            break
    return names
