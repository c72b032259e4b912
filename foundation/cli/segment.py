"""`universal-ct segment`: CTs in, masks, volumes and previews out."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from foundation.cli.shared import (
    add_device,
    add_json,
    add_model,
    add_verb,
    print_json,
    ready_device,
    say,
    split_names,
)
from foundation.interrupt import stopping_when_safe

if TYPE_CHECKING:
    from foundation.inference.cases import Case
    from foundation.inference.folder import Existing, Running
    from foundation.inference.outcomes import Outcome

_MORE = """exit codes: 0 all done, 3 some failed, 1 none done, 2 wrong usage; 130 and 143 stopped by
SIGINT and SIGTERM, with what is finished kept. --skip-existing goes on where a run ended: it leaves
what was made from the same CT, weights, classes, options and version, and reports results that were
made otherwise."""
_NOTICE = "Stopping after this window; Ctrl-C again ends at once."


def add_arguments(verbs: Any) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "segment", "segment CTs: masks, volumes and previews", _MORE)
    add = verb.add_argument
    add("ct", nargs="+", metavar="CT", help="NIfTI files, or folders of them or of ID/ct.nii.gz")
    text = "folder for OUT/<case>/…; for one CT also a file .nii.gz"
    add("-o", "--output", required=True, metavar="OUT", help=text)
    text = "only these (see `universal-ct classes`); all if not given"
    add("-c", "--classes", nargs="+", action="extend", metavar="CLASS", help=text)
    add_model(verb)
    add_device(verb)
    add("--overlap", type=float, help="share of overlap of the sliding windows, in [0, 1)")
    add("--preview", action="store_true", help="also a picture, preview.png")
    layout = verb.add_mutually_exclusive_group()
    kinds = ("multilabel", "per-class", "both")
    text = "one label map (default), one file a class, or both"
    layout.add_argument("--format", choices=kinds, default=kinds[0], help=text)
    text = "the same as --format per-class"
    layout.add_argument(
        "--per-class", dest="format", action="store_const", const="per-class", help=text
    )
    existing = verb.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace earlier results")
    existing.add_argument("--skip-existing", action="store_true", help="leave finished cases")
    many = verb.add_argument_group("many CTs")
    add = many.add_argument
    text = "the second of eight jobs that share the CTs, e.g. of a job array"
    add("--part", metavar="2/8", help=text)
    text = "also take up cases in which the process has died twice in a row"
    add("--retry", action="store_true", help=text)
    text = "where the run is noted, as JSON lines (default: OUT/universal-ct.jsonl), with a log"
    add("--manifest", metavar="FILE", help=text)
    text = "note names and paths too, which may name patients; not done by default"
    add("--names", action="store_true", help=text)
    text = "in jobs that share OUT, by submitit or Ray, of which any may die"
    add("--cluster", choices=("slurm", "local", "ray"), help=text)
    add("--jobs", type=int, default=1, metavar="N", help="how many (default: %(default)s)")
    text = "as submitit or Ray calls it: slurm_partition=gpu, timeout_min=600, num_gpus=1"
    add("--job-option", action="append", default=[], metavar="NAME=VALUE", help=text)
    add_json(verb)


def run(args: argparse.Namespace) -> int:
    """Segment the CTs; return the exit code.

    Raises:
        UsageError: See `find_cases`, `part_of` and `still_to_do`; or an unknown class, device or
            option.
        MissingExtraError: The library of `--cluster` is not installed.
        Interrupted: A signal came; what is done was reported.
    """
    from foundation.inference.cases import find_cases
    from foundation.inference.folder import Running, still_to_do
    from foundation.inference.manifest import Manifest, manifest_path
    from foundation.inference.outcomes import exit_code

    existing: Existing = (
        "overwrite" if args.overwrite else "skip" if args.skip_existing else "refuse"
    )
    found = find_cases(args.ct, args.output)
    where = args.manifest or manifest_path(args.output)
    running = Running(
        existing=existing,
        retry=args.retry,
        part=args.part,
        manifest=Manifest(where, names=args.names) if where else None,
        debug=args.debug,
    )
    cases = running.chosen(found)
    still_to_do(cases, existing)
    _check_known_classes(args.model, _classes(args))
    report = Report(args, len(cases))
    if args.cluster:
        from foundation.cli.cluster import in_jobs

        outcomes = in_jobs(args, cases)
    else:
        outcomes = segmented(args, running, found)
    try:
        for outcome in outcomes:
            report.add(outcome)
    finally:  # after a signal too: what is done is told
        report.end()
    return exit_code(report.outcomes)


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
        UsageError: See `run`.
        Interrupted: See `run`.
    """
    from foundation.inference.folder import segment_cases

    network, device, classes = None, args.device, _classes(args)
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


def _classes(args: argparse.Namespace) -> list[str] | None:
    return None if args.classes is None else split_names(args.classes)


class Report:
    """What is told of a batch: a line for each case, and at the end JSON or the numbers."""

    def __init__(self, args: argparse.Namespace, total: int) -> None:
        self.args, self.total = args, total
        self.outcomes: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        """Tell what became of a case."""
        self.outcomes.append(outcome)
        place = f"[{len(self.outcomes)}/{self.total}] {outcome.case}"
        if outcome.status == "failed":
            say(f"{place}: error: {outcome.error}")
        elif self.args.quiet:
            return
        elif outcome.status == "done":
            found = sum(ml > 0 for ml in outcome.volumes_ml.values())
            saved = os.path.dirname(outcome.files[-1])
            say(f"{place}: {found} structures in {outcome.seconds:g} s, saved to {saved}")
        elif outcome.status == "claimed":
            say(f"{place}: left to another process. {outcome.error}")

    def end(self) -> None:
        """Tell the numbers."""
        from foundation.inference.outcomes import count

        left = self.total - len(self.outcomes)
        if self.args.json:
            results = [asdict(each) for each in self.outcomes]
            print_json({"model": self.args.model, "left": left, "results": results})
        elif left or (self.total > 1 and not self.args.quiet):
            numbers = [f"{number} {status}" for status, number in count(self.outcomes).items()]
            numbers += [f"{left} left"] if left else []
            say(", ".join(numbers) + ".")


def _check_known_classes(model: str, classes: Sequence[str] | None) -> None:
    """Find a mistyped class before a large model is downloaded: all with a card have the 32."""
    from foundation import taxonomy
    from foundation.hub import cards

    if model in cards.card_names():
        for name in classes or ():
            taxonomy.resolve(name)
