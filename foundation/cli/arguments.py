"""What the command line understands: verbs and options. Parsing only, nothing heavy."""

from __future__ import annotations

import argparse
from typing import Any

from foundation.cli.add_class import add_arguments as _add_tuning
from foundation.cli.datasets import add_arguments as _add_datasets
from foundation.cli.prepare import add_arguments as _add_prepare
from foundation.cli.pretrain import add_arguments as _add_pretrain

DEFAULT_MODEL = "universal-ct"
DEMO_FOLDER = "universal-ct-demo"
NOTICE = "For research only: not a medical device, not for diagnosis or treatment."
_EXAMPLES = """examples:
  universal-ct demo                                 see a CT segmented
  universal-ct segment ct.nii.gz -o out --preview   masks, volumes.csv, preview.png in out/ct
  universal-ct segment dataset/ -o out -c liver spleen --json
  universal-ct models                               what can be loaded by name
  universal-ct prepare 04=LiTS -o store             a dataset, ready to train from
  universal-ct pretrain unet --store store          the paper's run
  universal-ct add-class "vertebra L1" --data scans -o runs/l1
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser; a parsed command has its verb in `verb`."""
    parser = argparse.ArgumentParser(
        prog="universal-ct",
        description=f"Segment organs and tumours in CT with one text-driven model. {NOTICE}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    _add_segment(verbs)
    for name, text in (
        ("models", "the models that can be loaded by name"),
        ("info", "the card and the configuration of a model"),
        ("classes", "the 32 classes: names, parents, SNOMED CT codes"),
    ):
        verb = _verb(verbs, name, text)
        if name == "info":
            verb.add_argument("model", metavar="MODEL", help="a name, a saved folder, or org/name")
        verb.add_argument("--json", action="store_true", help="JSON instead of text")
    _add_demo(verbs)
    _add_datasets(verbs)
    _add_prepare(verbs)
    _add_pretrain(verbs)
    _add_tuning(verbs)
    return parser


class _Version(argparse.Action):
    """Prints the version; reads it only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from foundation import __version__

        print(f"universal-ct {__version__}")
        parser.exit()


def _verb(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=f"{text}.")
    verb.add_argument("-q", "--quiet", action="store_true", help="only errors and results")
    verb.add_argument("--debug", action="store_true", help="tracebacks and all warnings")
    return verb


def _add_model_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a name of `universal-ct models`, a saved folder, a published checkpoint, or "
        "org/name@revision on the Hub (default: %(default)s)",
    )
    verb.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1 or mps")


def _add_segment(verbs: Any) -> None:
    verb = _verb(verbs, "segment", "segment CTs: masks, volumes and previews")
    add = verb.add_argument
    add("ct", nargs="+", metavar="CT", help="NIfTI files, or folders of them or of ID/ct.nii.gz")
    where = "folder for OUT/<case>/…; for one CT also a file .nii.gz"
    add("-o", "--output", required=True, metavar="OUT", help=where)
    which = "only these (see `universal-ct classes`); all if not given"
    add("-c", "--classes", nargs="+", action="extend", metavar="CLASS", help=which)
    _add_model_options(verb)
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
    add("--json", action="store_true", help="a report of all cases as JSON on standard output")


def _add_demo(verbs: Any) -> None:
    text = "segment an open example CT, or a generated phantom where it cannot be had"
    verb = _verb(verbs, "demo", text)
    add = verb.add_argument
    add("-o", "--output", default=DEMO_FOLDER, metavar="OUT", help="default: ./%(default)s")
    source = verb.add_mutually_exclusive_group()
    source.add_argument("--ct", metavar="FILE", help="your own CT instead")
    source.add_argument("--phantom", action="store_true", help="the phantom; nothing is fetched")
    add("--seed", type=int, default=0, help="of the phantom's anatomy (default: %(default)s)")
    _add_model_options(verb)
