"""`universal-ct models`: what can be loaded by name."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from foundation.cli.shared import add_json, add_verb, print_json, table


def add_arguments(verbs: Any) -> None:
    """Add the verb."""
    add_json(add_verb(verbs, "models", "the models that can be loaded by name"))


def run(args: argparse.Namespace) -> int:
    """List the models."""
    from foundation.hub.cards import list_models

    models = list_models()
    if args.json:
        print_json([asdict(model) for model in models])
        return 0
    header = ("name", "backbone", "classes", "parameters", "licence", "where")
    rows = [
        (m.name, m.backbone, f"{m.classes}", f"{m.parameters / 1e6:.1f} M", m.licence, m.where)
        for m in models
    ]
    print(table([header, *rows]))
    return 0
