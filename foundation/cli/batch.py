"""What a command and a job of a cluster have in common: a batch of CTs in one process."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from foundation.cli.shared import ready_device, split_names
from foundation.interrupt import stopping_when_safe

if TYPE_CHECKING:
    from foundation.inference.cases import Case
    from foundation.inference.folder import Existing, Running
    from foundation.inference.outcomes import Outcome

_NOTICE = "Stopping after this window; Ctrl-C again ends at once."


def running_of(args: argparse.Namespace) -> Running:
    """Return how a batch runs, by the arguments of `universal-ct segment`.

    Raises:
        UsageError: The manifest's file is another.
    """
    from foundation.inference.folder import Running
    from foundation.inference.manifest import Manifest, manifest_path

    existing: Existing = (
        "overwrite" if args.overwrite else "skip" if args.skip_existing else "refuse"
    )
    where = args.manifest or manifest_path(args.output)
    return Running(
        existing=existing,
        retry=args.retry,
        part=args.part,
        manifest=Manifest(where, names=args.names) if where else None,
        debug=args.debug,
    )


def wanted_classes(args: argparse.Namespace) -> list[str] | None:
    """Return the names of the classes that are asked for; None for all."""
    return None if args.classes is None else split_names(args.classes)


def segmented(
    args: argparse.Namespace, running: Running, found: Sequence[Case]
) -> Iterator[Outcome]:
    """Segment cases in this process, and stop when a signal has come.

    Args:
        args: Of the command.
        running: How the batch runs.
        found: All cases, also those of other parts.

    Yields:
        What became of each CT of this part.

    Raises:
        UsageError: An unknown class, device or option, or see `segment_cases`.
        Interrupted: A signal came.
    """
    from foundation.inference.folder import segment_cases

    network, device, classes = None, args.device, wanted_classes(args)
    if any(case.ct.exists() for case in running.chosen(found)):  # not for a mistyped path
        from foundation.hub.load import from_pretrained
        from foundation.inference.predict import resolve_classes

        network = from_pretrained(args.model)
        resolve_classes(classes, network.classes)
        device = ready_device(device)
    # A doubt about each CT is told, also where its words are those about another.
    with warnings.catch_warnings(), stopping_when_safe("" if args.quiet else _NOTICE):
        warnings.simplefilter("always")
        yield from segment_cases(
            network,
            found,
            running,
            classes=classes,
            device=device,
            overlap=args.overlap,
            layout=args.format.replace("-", "_"),
            preview=args.preview,
            progress=not args.quiet,
        )
