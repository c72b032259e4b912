"""`universal-ct segment`: CTs in, masks, volumes and previews out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from foundation.cli import cluster
from foundation.cli.batch import running_of, segmented, wanted_classes
from foundation.cli.shared import add_device, add_json, add_model, add_verb, print_json, say

if TYPE_CHECKING:
    from foundation.inference.outcomes import Outcome

_MORE = """exit codes: 0 all done, 3 some failed, 1 none done, 2 wrong usage; 130 and 143 stopped by
SIGINT and SIGTERM, with what is finished kept. --skip-existing goes on where a run ended: it leaves
what was made from the same CT, weights, classes, options and version, and reports results that were
made otherwise."""


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
    from foundation.inference.folder import still_to_do
    from foundation.inference.outcomes import exit_code

    found = find_cases(args.ct, args.output)
    running = running_of(args)
    cases = running.chosen(found)
    still_to_do(cases, running.existing)
    _check_known_classes(args.model, wanted_classes(args))
    report = Report(args, len(cases))
    in_jobs = cluster.in_jobs(args, cases) if args.cluster else None
    try:
        for outcome in in_jobs or segmented(args, running, found):
            report.add(outcome)
    except KeyboardInterrupt:
        report.end()  # what is done, and what is left
        raise
    report.end()
    return exit_code(report.outcomes)


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
            if outcome.doubts:
                words = [f"{name} {', '.join(each)}" for name, each in outcome.doubts.items()]
                say(f"  look at these: {'; '.join(words)}")
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
