"""`universal-ct segment`: CTs in, masks, volumes and previews out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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

if TYPE_CHECKING:
    from foundation.inference.folder import Existing, Outcome


def add_arguments(verbs: Any) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "segment", "segment CTs: masks, volumes and previews")
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
    add_json(verb)


def run(args: argparse.Namespace) -> int:
    """Segment the CTs; return 1 if one failed, else 0.

    Raises:
        UsageError: See `find_cases` and `still_to_do`; or an unknown class, device or option.
    """
    from foundation.inference.folder import find_cases, segment_cases, still_to_do

    existing: Existing = (
        "overwrite" if args.overwrite else "skip" if args.skip_existing else "refuse"
    )
    cases = find_cases(args.ct, args.output)
    todo = still_to_do(cases, existing)
    classes = None if args.classes is None else split_names(args.classes)
    _check_known_classes(args.model, classes)
    network = None
    device = args.device
    if any(case.ct.exists() for case in todo):  # not loaded for the sake of a mistyped path
        from foundation.hub.load import from_pretrained
        from foundation.inference.predict import resolve_classes

        network = from_pretrained(args.model)
        resolve_classes(classes, network.classes)
        device = ready_device(device)
    outcomes = segment_cases(
        network,
        cases,
        existing=existing,
        debug=args.debug,
        classes=classes,
        device=device,
        overlap=args.overlap,
        layout=args.format.replace("-", "_"),
        preview=args.preview,
        progress=not args.quiet,
    )
    results: list[Outcome] = []
    for number, (case, outcome) in enumerate(zip(cases, outcomes, strict=True), 1):
        results.append(outcome)
        place = f"[{number}/{len(cases)}] {case.name}"
        if outcome.status == "failed":
            say(f"{place}: error: {outcome.error}")
        elif outcome.status == "done" and not args.quiet:
            found = sum(ml > 0 for ml in outcome.volumes_ml.values())
            say(f"{place}: {found} structures in {outcome.seconds:g} s, saved to {case.output}")
    counts = {
        status: sum(each.status == status for each in results)
        for status in ("done", "skipped", "failed")
    }
    if args.json:
        print_json({"model": args.model, "results": [asdict(each) for each in results]})
    elif len(cases) > 1 and not args.quiet:
        say(", ".join(f"{count} {status}" for status, count in counts.items()) + ".")
    return 1 if counts["failed"] else 0


def _check_known_classes(model: str, classes: Sequence[str] | None) -> None:
    """Find a mistyped class before a large model is downloaded: all with a card have the 32."""
    from foundation import taxonomy
    from foundation.hub import cards

    if model in cards.card_names():
        for name in classes or ():
            taxonomy.resolve(name)
