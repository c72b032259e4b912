"""`universal-ct demo`: an example CT, segmented."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.cli.shared import (
    NOTICE,
    add_device,
    add_model,
    add_verb,
    ready_device,
    say,
)
from foundation.errors import UsageError
from foundation.files import nifti_stem

if TYPE_CHECKING:
    from foundation.inference.outcomes import Outcome

_FOLDER = "universal-ct-demo"


def add_arguments(verbs: Any) -> None:
    """Add the verb."""
    text = "segment an open example CT, or a generated phantom where it cannot be had"
    verb = add_verb(verbs, "demo", text)
    add = verb.add_argument
    add("-o", "--output", default=_FOLDER, metavar="OUT", help="default: ./%(default)s")
    source = verb.add_mutually_exclusive_group()
    source.add_argument("--ct", metavar="FILE", help="your own CT instead")
    source.add_argument("--phantom", action="store_true", help="the phantom; nothing is fetched")
    add("--seed", type=int, default=0, help="of the phantom's anatomy (default: %(default)s)")
    add_model(verb)
    add_device(verb)


def run(args: argparse.Namespace) -> int:
    """Segment the example and print its volumes.

    Raises:
        UsageError: The output is no folder, or others' files lie where results would.
    """
    from foundation.hub.example import prepare_ct
    from foundation.hub.load import from_pretrained
    from foundation.inference.cases import Case
    from foundation.inference.folder import segment_case, still_to_do

    output = Path(args.output)
    if nifti_stem(output) is not None or (output.exists() and not output.is_dir()):
        raise UsageError(f"{output} is a file, not a folder. Give -o a folder.")
    case = Case("demo", Path(args.ct or ""), output)
    still_to_do([case], "overwrite")  # before anything is loaded or written
    network, device = from_pretrained(args.model), ready_device(args.device)
    ct, what = prepare_ct(output, ct=args.ct, phantom=args.phantom, seed=args.seed)
    if not args.quiet:
        say(what)
    outcome = segment_case(
        network, replace(case, ct=ct), device=device, preview=True, progress=not args.quiet
    )
    print(_volumes(outcome))
    if not args.quiet:
        say(f"\nSegmented by {args.model} in {outcome.seconds:g} s. See {output}:")
        files = [str(ct), *outcome.files]
        say("\n".join(f"  {os.path.relpath(file, output)}" for file in files))
        say(NOTICE)
    return 0


def _volumes(outcome: Outcome) -> str:
    """The classes that were found, with their volumes, as lines of text."""
    found = {name: ml for name, ml in outcome.volumes_ml.items() if ml > 0}
    wide = max(map(len, found), default=5)
    rows = [
        f"{name:<{wide}}  {ml:>9.1f}{'  cut by the border' if name in outcome.truncated else ''}"
        for name, ml in found.items()
    ]
    return "\n".join([f"{'class':<{wide}}  {'volume_ml':>9}", *(rows or ["nothing found"])])
