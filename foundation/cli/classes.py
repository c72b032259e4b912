"""`universal-ct classes`: the 32 classes of the paper."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from foundation.cli.shared import add_json, add_verb, print_json, table


def add_arguments(verbs: Any) -> None:
    """Add the verb."""
    add_json(add_verb(verbs, "classes", "the 32 classes: names, parents, SNOMED CT codes"))


def run(args: argparse.Namespace) -> int:
    """List the classes."""
    from foundation.taxonomy import CLASSES

    if args.json:
        kinds = {c.name: {"kind": c.kind, "laterality": c.laterality} for c in CLASSES}
        print_json([{**asdict(c), **kinds[c.name]} for c in CLASSES])
        return 0
    header = ("index", "name", "display", "parent", "SNOMED CT", "also called")
    rows = [
        (f"{c.index}", c.name, c.display, c.parent or "", c.snomed or "", ", ".join(c.aliases))
        for c in CLASSES
    ]
    print(table([header, *rows]))
    return 0
