"""`universal-ct prepare`: datasets into a store."""

from __future__ import annotations

import argparse
from typing import Any

from foundation.cli.shared import add_json, add_verb, print_json
from foundation.errors import UsageError

_MORE = """DATASET is an id or name of `universal-ct datasets`, or a YAML file of your own.

Run it again to continue: finished cases whose files and settings are the same are left alone. A
case that cannot be read is named and skipped; the exit code is then 1.

  universal-ct prepare 04=LiTS 05=kits19/data my-ct.yaml=/data/my-ct -o store

With --check nothing is prepared: every file of a store is compared with the SHA-256 that it was
written with, damaged cases are named, and the exit code is 1 if there is one. Prepare the same
datasets again to mend them.

  universal-ct prepare --check store
"""


def add_arguments(verbs: Any) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "prepare", "bring labelled datasets into one store to train from", _MORE)
    add = verb.add_argument
    add("datasets", nargs="*", metavar="DATASET=DIR", help="a dataset and the folder it lies in")
    add("-o", "--output", metavar="STORE", help="folder of the store")
    add("--check", metavar="STORE", help="prepare nothing: look for damage in this store")
    add("--spacing", type=float, default=1.5, metavar="MM", help="of voxels (default: 1.5 mm)")
    text = "derive heads of femurs from labels of femur and hip bone, named as by TotalSegmentator"
    add("--femoral-heads", action="store_true", help=text)
    add("--workers", type=int, metavar="N", help="processes (default: one a core, at most 8)")
    add("--overwrite", action="store_true", help="prepare finished cases again")
    text = "refuse data whose files differ from those in this manifest.json"
    add("--manifest", metavar="FILE", help=text)
    add_json(verb)


def run(args: argparse.Namespace) -> int:
    """Prepare the datasets, or check a store; return 1 if a case failed or is damaged, else 0.

    Raises:
        UsageError: An operand is not DATASET=DIR, datasets or the store are not given, or both are
            given with --check; or see `prepare`.
    """
    if args.check is not None:
        if args.datasets or args.output:
            raise UsageError("--check STORE takes no datasets and no -o: it prepares nothing.")
        return _check(args)
    if not args.datasets or not args.output:
        raise UsageError("Give DATASET=DIR and -o STORE to prepare, or --check STORE.")
    from foundation.data.store.prepare import prepare

    report = prepare(
        [_pair(text) for text in args.datasets],
        args.output,
        spacing_mm=args.spacing,
        femoral_heads=args.femoral_heads,
        workers=args.workers,
        overwrite=args.overwrite,
        manifest=args.manifest,
        progress=not args.quiet,
    )
    if args.json:
        content = {
            "store": str(report.store),
            "prepared": list(report.prepared),
            "skipped": list(report.skipped),
            "failed": dict(report.failed),
        }
        print_json(content)
    else:
        print(
            f"{len(report.prepared)} prepared, {len(report.skipped)} unchanged, "
            f"{len(report.failed)} failed: {report.store}"
        )
    return 1 if report.failed else 0


def _check(args: argparse.Namespace) -> int:
    from foundation.data.store.checking import check_store

    found = check_store(args.check, progress=not args.quiet)
    if args.json:
        content = {
            "store": str(found.store),
            "cases": found.cases,
            "damaged": dict(found.damaged),
            "without_sums": list(found.without_sums),
        }
        print_json(content)
    else:
        for key, why in found.damaged.items():
            print(f"{key}: {why}")
        count = len(found.without_sums)
        older = f", {count} from before there were sums" if count else ""
        print(f"{found.cases} cases, {len(found.damaged)} damaged{older}: {found.store}")
    return 1 if found.damaged else 0


def _pair(text: str) -> tuple[str, str]:
    dataset, equals, folder = text.partition("=")
    if not (equals and dataset and folder):
        raise UsageError(
            f"Cannot read {text!r}; give DATASET=DIR, e.g. 04=/data/LiTS or my-ct.yaml=/data/my-ct."
        )
    return dataset, folder
