"""The command line, assembled: the parser of all verbs, and the exit codes.

Everything heavy is imported by the verb that needs it: `--help`, `models`, `info` of a known model
and `classes` answer without torch or numpy. Results go to files or, as text or JSON, to standard
output; all else goes to standard error. Exit codes: 0 success, 1 failure, 2 wrong usage, 3 of many
CTs some failed, 130 interrupted by SIGINT, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from foundation import __version__
from foundation.cli import (
    add_class,
    classes,
    datasets,
    demo,
    doctor,
    evaluate,
    info,
    models,
    prepare,
    pretrain,
    reproduce,
    segment,
)
from foundation.cli.shared import NOTICE, messages, say
from foundation.errors import UniversalCTError, UsageError
from foundation.interrupt import Interrupted

_VERBS: dict[str, Any] = {
    "segment": segment,
    "models": models,
    "info": info,
    "classes": classes,
    "evaluate": evaluate,
    "demo": demo,
    "doctor": doctor,
    "datasets": datasets,
    "prepare": prepare,
    "pretrain": pretrain,
    "add-class": add_class,
    "reproduce": reproduce,
}
_EXAMPLES = """examples:
  universal-ct demo                                 see a CT segmented
  universal-ct segment ct.nii.gz -o out --preview   masks, volumes.csv, preview.png in out/ct
  universal-ct segment dataset/ -o out -c liver spleen --json
  universal-ct evaluate out labelsTs -o scores.csv  anyone's masks against labels, by class
  universal-ct models                               what can be loaded by name
  universal-ct prepare 04=LiTS -o store             a dataset, ready to train from
  universal-ct pretrain unet --store store          the paper's run
  universal-ct add-class "vertebra L1" --data scans -o runs/l1
  universal-ct reproduce universal-ct --data DATA   the card's numbers, run again
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The words after `universal-ct`; those of the process if not given.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a letter the terminal lacks must not end a run
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help, the version or what is wrong
        words = sys.argv[1:] if argv is None else argv
        if stop.code and (paths := [w for w in words if w[:1] == "-" and os.path.exists(w)]):
            say(f"A path that begins with - is taken for an option. Write it as ./{paths[0]}")
        return stop.code if isinstance(stop.code, int) else 1
    try:
        with messages(args):
            code: int = _VERBS[args.verb].run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe had enough, as in `universal-ct classes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UniversalCTError, OSError) as error:
        if args.debug:
            raise
        say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as stop:
        say("Interrupted. What was finished is kept; nothing is left half-written.")
        return stop.exit_code if isinstance(stop, Interrupted) else 130


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; a parsed command has its verb in `verb`."""
    parser = argparse.ArgumentParser(
        prog="universal-ct",
        description=f"Segment organs and tumours in CT with one text-driven model. {NOTICE}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"universal-ct {__version__}"
    text = "show the version and exit"
    parser.add_argument("--version", action="version", version=version, help=text)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for verb in _VERBS.values():
        verb.add_arguments(verbs)
    return parser
