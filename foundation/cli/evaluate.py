"""`universal-ct evaluate`: anyone's masks against anyone's labels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.cli.shared import add_json, add_verb, print_json, say, split_names, table
from foundation.errors import UsageError, listed

if TYPE_CHECKING:
    from foundation.evaluation.intervals import Interval
    from foundation.evaluation.scores import Metric, Scores

_MORE = """PRED and GT are each a label map (.nii.gz), a folder with one mask a class, or a folder
of cases of either kind: results of `universal-ct segment`, of TotalSegmentator or of nnU-Net, and
datasets. Cases are matched by name, classes by name and alias. Values of label maps are named by
segmentation.json, the file's header, labels.json or dataset.json beside it, or --names.

Both must be on one grid: nothing is resampled. A scan counts for a class where its reference shows
it. A lesion's voxels count for its organ too. "missed": the reference shows the class, the mask is
empty. "false": the mask shows what the reference labels and does not show.
"""
_METRICS: tuple[tuple[str, Metric, str], ...] = (
    ("Dice", "dice", ".3f"),
    ("NSD", "nsd", ".3f"),
    ("HD95 mm", "hd95_mm", ".2f"),
    ("volume error ml", "volume_error_ml", ".1f"),
    ("%", "volume_error_percent", ".1f"),
)
_SURFACE = ("nsd", "hd95_mm")
_INTERVALS = ("dice", "nsd")  # that have one in the table; the JSON has all


def add_arguments(verbs: Any) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "evaluate", "compare masks with labels: Dice, NSD, HD95, volumes", _MORE)
    add = verb.add_argument
    add("prediction", metavar="PRED", type=Path, help="the masks")
    add("reference", metavar="GT", type=Path, help="the labels that they are compared with")
    add("-o", "--output", type=Path, metavar="FILE", help="a row a case and class, .csv or .json")
    add("--overwrite", action="store_true", help="replace an earlier file")
    text = "only these; all that GT labels if not given"
    add("-c", "--classes", nargs="+", action="extend", metavar="CLASS", help=text)
    text = "of the surface Dice: mm, or a YAML file {class: mm, default: mm} (default: %(default)s)"
    add("--tolerance", default="2.0", metavar="MM|YAML", help=text)
    add("--names", type=Path, metavar="YAML", help="names of label values, {1: liver, 2: spleen}")
    add("--no-surface", action="store_true", help="no NSD and HD95, which take most of the time")
    add_json(verb)


def run(args: argparse.Namespace) -> int:
    """Compare the masks; return 1 if a case failed, else 0.

    Raises:
        UsageError: A path holds nothing to compare, no case is in both, an unknown class, a
            tolerance that is none, or a file is in the way.
    """
    from foundation.evaluation.folders import chosen_classes, match, read_tolerance, score_pairs
    from foundation.evaluation.scores import Scores

    _check_output(args.output, args.overwrite)
    tolerance_mm = None if args.no_surface else read_tolerance(args.tolerance)
    matched = match(args.prediction, args.reference, args.names)
    classes = chosen_classes(split_names(args.classes), matched.classes) if args.classes else None
    rows, failed = [], {}
    cases = score_pairs(matched, classes, tolerance_mm=tolerance_mm, hd95=tolerance_mm is not None)
    for number, (case, found) in enumerate(cases, 1):
        if isinstance(found, Exception):
            failed[case] = str(found)
            say(f"[{number}/{len(matched.pairs)}] {case}: error: {found}")
        else:
            rows += found
            if not args.quiet and len(matched.pairs) > 1:
                say(f"[{number}/{len(matched.pairs)}] {case}: {len(found)} classes")
    scores = Scores(tuple(rows), tolerance_mm)
    for names, text in (
        (matched.without_prediction, "references have no prediction"),
        (matched.without_reference, "predictions have no reference"),
    ):
        if names:
            say(f"{len(names)} {text}: {listed(names)}")
    if args.output:
        scores.write(args.output)
    if args.json:
        print_json(_as_json(args, scores, failed, matched))
    elif rows:
        print(_table(scores, tolerance_mm is not None))
    return 1 if failed else 0


def _check_output(path: Path | None, overwrite: bool) -> None:
    if path is None:
        return
    if path.suffix not in (".csv", ".json"):
        raise UsageError(f"Cannot write scores to {path}: name it .json or .csv.")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} is there already. Add --overwrite, or give another -o.")


def _table(scores: Scores, surface: bool) -> str:
    metrics = [each for each in _METRICS if surface or each[1] not in _SURFACE]
    heads = [head for head, _, _ in metrics]
    rows: list[tuple[str, ...]] = [("class", "scans", *heads, "missed", "false", "no prediction")]
    predicted = dict.fromkeys(row.name for row in scores.rows if row.status != "no prediction")
    never = list(dict.fromkeys(row.name for row in scores.rows if row.name not in predicted))
    names = list(predicted)
    for title, group in [*((name, [name]) for name in names), ("all, mean", names)]:
        cells = [_cell(scores, group, metric, form) for _, metric, form in metrics]
        rows.append((title, f"{len(scores.by_case(group))}", *cells, *_counts(scores, group)))
    if len(scores.cases) < 3:
        note = "Fewer than three scans: no intervals."
    else:
        note = "In brackets: 95 % intervals by bootstrap over scans."
    text = f"{table(rows)}\n\nMeans over the scans whose reference shows the class. {note}"
    if never:
        text += f"\nNo prediction of {len(never)} classes that are labelled: {listed(never)}."
    return text


def _cell(scores: Scores, names: Sequence[str], metric: Metric, form: str) -> str:
    mean = scores.mean(names, metric)
    if mean is None:
        return "-"
    interval: Interval = scores.interval(names, metric) if metric in _INTERVALS else None
    ends = f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else ""
    return f"{mean:{form}}{ends}"


def _counts(scores: Scores, names: Sequence[str]) -> tuple[str, str, str]:
    rows = [row for row in scores.rows if row.name in names]
    return (
        f"{sum(row.missed for row in rows)}",
        f"{sum(row.false_positive for row in rows)}",
        f"{sum(row.status == 'no prediction' for row in rows)}",
    )


def _as_json(
    args: argparse.Namespace, scores: Scores, failed: dict[str, str], matched: Any
) -> dict[str, Any]:
    from dataclasses import asdict

    names = list(dict.fromkeys(row.name for row in scores.rows))

    def about(group: list[str]) -> dict[str, Any]:
        missed, false, none = map(int, _counts(scores, group))
        return {
            "scans": len(scores.by_case(group)),
            **{
                metric: {
                    "mean": scores.mean(group, metric),
                    "interval": scores.interval(group, metric),
                }
                for _, metric, _ in _METRICS
            },
            "missed": missed,
            "false_positive": false,
            "no_prediction": none,
        }

    return {
        "prediction": str(args.prediction),
        "reference": str(args.reference),
        "tolerance_mm": scores.tolerance_mm,
        "classes": {name: about([name]) for name in names},
        "mean": about(names),
        "rows": [asdict(row) for row in scores.rows],
        "failed": failed,
        "without_prediction": list(matched.without_prediction),
        "without_reference": list(matched.without_reference),
    }
