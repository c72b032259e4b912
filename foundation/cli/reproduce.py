"""`universal-ct reproduce`: the numbers of a card, run again."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.cli.shared import add_json, add_verb, print_json, say

if TYPE_CHECKING:
    from foundation.evaluation.reproduce import Reproduction

_MORE = """The SHA-256 of every file that a record names is checked first; a file that is missing or
was changed is named. Exit code: 0 if every number of every record is there, within the tolerance;
otherwise 1.

examples:
  universal-ct reproduce universal-ct --data DATA
  universal-ct reproduce runs/mine/model --data DATA --ignore-hashes
"""


def add_arguments(verbs: Any) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "reproduce", "run the numbers of a model's card again", _MORE)
    verb.add_argument("model", metavar="CARD", help="a name, a saved folder, a card, or org/name")
    text = "the folder that holds the data by the names in the records (default: here)"
    verb.add_argument("--data", type=Path, default=Path(), metavar="DIR", help=text)
    text = "go on with files that were changed, and say which numbers moved"
    verb.add_argument("--ignore-hashes", action="store_true", help=text)
    text = "by how much a Dice may differ; by default as rounding on another machine may change it"
    verb.add_argument("--tolerance", type=float, metavar="DICE", help=text)
    add_json(verb)


def run(args: argparse.Namespace) -> int:
    """Check, run, compare."""
    from foundation.evaluation.reproduce import TOLERANCE, reproduce

    results = []
    tolerance = TOLERANCE if args.tolerance is None else args.tolerance
    for result in reproduce(
        args.model, args.data, ignore_hashes=args.ignore_hashes, tolerance=tolerance
    ):
        results.append(result)
        if not args.json:
            print(_told(result, tolerance), flush=True)
    done = sum(result.status == "reproduced" for result in results)
    if args.json:
        print_json([asdict(result) for result in results])
    say(f"{done} of {len(results)} records reproduced.")
    return 0 if done == len(results) else 1


def _told(result: Reproduction, tolerance: float) -> str:
    record = result.record
    arm = ", ".join(f"{key} {value}" for key, value in record.arm.items() if key == "dataset")
    lines = [f"{record.benchmark} {arm} ({record.date}): {result.status}".replace("  ", " ")]
    lines += [f"  {reason}" for reason in result.reasons]
    if result.compared:
        same = result.compared - len(result.moved)
        lines.append(f"  {same} of {result.compared} figures are the same.")
    for each in result.moved:
        change = ""
        if each.was is not None and each.now is not None:
            change = f", {each.now - each.was:+.2g}"
            change += f" (within {tolerance:g})" if each.within else ""
        was, now = ("no value" if v is None else f"{v:.6g}" for v in (each.was, each.now))
        lines.append(f"  {each.name} moved: {was} → {now}{change}")
    return "\n".join(lines)
