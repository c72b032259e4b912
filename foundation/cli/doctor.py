"""`universal-ct doctor`: whether everything works on this machine."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from foundation.cli.shared import add_json, add_verb, print_json


def add_arguments(verbs: Any) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "doctor", "tell whether everything works on this machine")
    add_json(verb)


def run(args: argparse.Namespace) -> int:
    """Print each check as it ends; return 1 if one failed, else 0."""
    from foundation.hub.doctor import Check, examine

    checks: list[Check] = []
    for check in examine():
        checks.append(check)
        if not args.json and not (args.quiet and check.status == "ok"):
            print(f"{check.status:<7}{check.name}: {check.text}", flush=True)
    if args.json:
        print_json([asdict(check) for check in checks])
    return int(any(check.status == "failed" for check in checks))
