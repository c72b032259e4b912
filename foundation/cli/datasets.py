"""`universal-ct datasets`: what can be trained on, and whether a folder of it is in order."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.cli.shared import add_common, add_json, add_verb, print_json

if TYPE_CHECKING:
    from foundation.data.check import Report

_MOST_FAULTS = 50  # shown; --json has them all


def add_arguments(verbs: Any) -> None:
    """Add the verb `datasets`, which lists, and below it `check`."""
    text = "the datasets that can be trained on: licence, where to get them, and a check of yours"
    parser = add_verb(verbs, "datasets", text)
    add_json(parser)
    below = parser.add_subparsers(dest="action", metavar="ACTION")
    text = "find a dataset's cases in a folder, count its labels, and say what is wrong"
    check = below.add_parser("check", help=text, description=f"{text}. Exits with 1 on faults.")
    text = "id or name of the list, a YAML file, or a folder in nnU-Net's format"
    check.add_argument("name", metavar="NAME", help=text)
    text = "where the dataset lies, unpacked; of nnU-Net's format, NAME itself"
    check.add_argument("folder", metavar="DIR", nargs="?", help=text)
    check.add_argument("--limit", type=int, metavar="N", help="read only the first N cases")
    # No default of its own, which would undo an option given before the word `check`.
    unset = argparse.SUPPRESS
    add_json(check, unset)
    add_common(check, unset)


def run(args: argparse.Namespace) -> int:
    """List the datasets, or check one; return 1 if the check finds faults, else 0.

    Raises:
        UsageError: The dataset is unknown, or nothing of it lies in the folder.
        MissingExtraError: The dataset is DICOM, and SimpleITK is not installed.
    """
    return _check(args) if args.action == "check" else _list(args)


def _list(args: argparse.Namespace) -> int:
    from foundation.data.catalogue import paper_datasets

    rows: list[dict[str, Any]] = [
        {
            "id": dataset.id,
            "name": dataset.name,
            "licence": dataset.licence,
            "cases_in_paper": dataset.paper_cases,
            "cases_used": dataset.used_cases,
            "classes": list(dataset.annotated),
            "url": dataset.url,
            "obtain": dataset.obtain,
            "layout": dataset.layout.expected,
            "note": dataset.note,
        }
        for dataset in paper_datasets().values()
    ]
    if args.json:
        print_json(rows)
        return 0
    for row in rows:
        cases = "/".join(str(row[key] or "–") for key in ("cases_in_paper", "cases_used"))
        where = "; ".join(filter(None, (row["url"], row["obtain"])))
        print(f"{row['id']:<6} {row['name']}")
        facts = {
            "licence": row["licence"] or "see its source",
            "cases": f"{cases} (paper/used by the published weights)",
            "classes": f"{len(row['classes'])}: {', '.join(row['classes'])}",
            "from": where or "see the paper",
            "layout": row["layout"],
            "note": row["note"],
        }
        print("".join(f"       {key + ':':<9}{text}\n" for key, text in facts.items() if text))
    return 0


def _check(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from foundation.data.catalogue import get_dataset
    from foundation.data.check import check_dataset
    from foundation.data.layouts import INDEX
    from foundation.errors import UsageError

    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit is {args.limit}; give a number of cases, from 1 on.")
    dataset, folder = get_dataset(args.name), args.folder
    if folder is None:
        given = Path(args.name)
        folder = given.parent if given.name == INDEX else given
        if not (folder / INDEX).is_file():
            raise UsageError(f"Where does {dataset.name} lie? Give NAME and DIR.")
    report = check_dataset(
        dataset,
        folder,
        limit=args.limit,
        # None: hidden where no terminal shows it.
        progress=lambda cases: tqdm(cases, unit="case", disable=True if args.quiet else None),
    )
    if args.json:
        print_json(_as_json(report))
    else:
        print(_as_text(report))
    return 1 if report.faults else 0


def _as_json(report: Report) -> dict[str, Any]:
    classes = {n: {"cases": c, "voxels": v} for n, (c, v) in report.classes.items()}
    summary = {"classes": classes, "orientations": report.orientations, "ranges": report.ranges()}
    return {**asdict(report), **summary}


def _as_text(report: Report) -> str:
    lines = [f"{report.name}: {len(report.cases)} cases read in {report.folder}"]
    facts = [f"{name} in {number}" for name, number in report.orientations.items()]
    lines += [f"  orientation: {', '.join(facts)}"] if facts else []
    lines += [f"  {what}: {low:g} to {high:g}" for what, (low, high) in report.ranges().items()]
    if report.classes:
        lines += ["", *_table(report)]
    lines += ["", *(f"note: {note}" for note in report.notes)] if report.notes else []
    if not report.faults:
        return "\n".join([*lines, "", "No fault found."])
    lines += ["", f"{len(report.faults)} faults:"]
    lines += [f"  {fault}" for fault in report.faults[:_MOST_FAULTS]]
    more = len(report.faults) - _MOST_FAULTS
    return "\n".join([*lines, *([f"  and {more} more (--json has all)"] if more > 0 else [])])


def _table(report: Report) -> Sequence[str]:
    width = max(map(len, report.classes))
    rows = [f"  {'class':<{width}}  {'cases':>5}  {'voxels':>13}"]
    for name, (cases, voxels) in report.classes.items():
        rows.append(f"  {name:<{width}}  {cases:>5}  {voxels:>13,}")
    return rows
