"""`universal-ct pretrain`: train a model from a configuration."""

from __future__ import annotations

import argparse
from typing import Any

from foundation.cli.shared import add_verb, intermix, prints_results
from foundation.errors import UsageError

_MORE = """Started again with the same --output, it goes on where it stopped. For many GPUs:
torchrun --nproc-per-node N -m foundation pretrain CONFIG …, or accelerate launch.
"""


def add_arguments(verbs: Any) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "pretrain", "train a model from a configuration", _MORE)
    add = verb.add_argument
    add("config", metavar="CONFIG", help="a YAML file, or the name of a shipped configuration")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. optimizer.learning_rate=1e-3")
    add("--store", metavar="DIR", help="prepared scans, made by `universal-ct prepare`")
    add("-o", "--output", metavar="RUN", help="folder of the run (default: runs/NAME)")
    add("--smoke", action="store_true", help="two steps on generated data on the CPU")
    add("--cpu", action="store_true", help="leave GPUs alone")
    intermix(verb)


def run(args: argparse.Namespace) -> int:
    """Train, and print where the model lies; return the exit code.

    Raises:
        UniversalCTError: As `foundation.pretraining.run.pretrain`.
    """
    for override in args.overrides:
        if "=" not in override:
            raise UsageError(f"{override!r} is not KEY=VALUE, e.g. optimizer.learning_rate=1e-3.")
    from foundation.pretraining.run import pretrain

    folder = pretrain(
        args.config,
        store=args.store,
        output=args.output,
        overrides=args.overrides,
        smoke_test=args.smoke,
        cpu=args.cpu,
        progress=not args.quiet,
    )
    if prints_results():
        print(folder)
    return 0
