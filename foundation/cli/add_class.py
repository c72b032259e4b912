"""`universal-ct add-class`: teach a model classes by prompt and a few scans."""

from __future__ import annotations

import argparse
from typing import Any

from foundation.cli.shared import (
    add_device,
    add_json,
    add_model,
    add_verb,
    intermix,
    print_json,
    prints_results,
    say,
)
from foundation.errors import UsageError
from foundation.tuning.methods import METHODS

_TEXT = "teach a model classes by prompt and a few labelled scans, new ones or its own"
_MORE = """DIR holds a folder for each case (ct.nii.gz with labels.nii.gz and labels.json, or
one mask a class), an nnU-Net dataset, or TotalSegmentator's tree; or it is a CSV of image, label,
class.

  universal-ct add-class "vertebra L1" "vertebra L2" --data scans -o runs/lumbar
  universal-ct add-class metastasis --parent liver --data scans.csv --method lora -o runs/met
  universal-ct add-class liver --data scans -o runs/liver --method full
  universal-ct segment ct.nii.gz -m runs/lumbar -c "vertebra L1" -o out

A CLASS that the model has is tuned further: it keeps its name, its channel and its colour. Any
other one is added.

Methods:
{methods}

Run it again to go on after an interruption. For many GPUs: torchrun --nproc-per-node N -m
foundation add-class ….
"""


def add_arguments(verbs: Any) -> None:
    """Add the verb."""
    verb = add_verb(verbs, "add-class", _TEXT, _MORE.format(methods=_described()))
    add = verb.add_argument
    add("classes", nargs="+", metavar="CLASS", help='names, e.g. "vertebra L1"')
    add("--data", required=True, metavar="DIR", help="labelled scans to learn from")
    add("-o", "--output", required=True, metavar="OUT", help="folder of model and report")
    add_model(verb)
    add("--method", choices=[*METHODS], default="head", help="see below (default: %(default)s)")
    text = "what the files call a class, where that is not its name"
    add("--label", action="append", default=[], metavar="CLASS=LABEL", help=text)
    text = "sentence that is embedded (default: by the weights' template)"
    add("--prompt", action="append", default=[], metavar="CLASS=TEXT", help=text)
    text = "organ that a lesion lies in: for all classes, or of one"
    add("--parent", action="append", default=[], metavar="[CLASS=]ORGAN", help=text)
    add("--test", metavar="DIR", help="scans that are only measured")
    text = "share of the scans that decide when to stop (default: %(default)s)"
    add("--validation", type=float, default=0.2, metavar="SHARE", help=text)
    text = (
        "how old classes that the scans do not label are kept: distil (the old model teaches), "
        "mask, or nothing (they count as absent: they will be forgotten)"
    )
    add("--protect", choices=("distil", "mask", "nothing"), help=text)
    add("--steps", type=int, metavar="N", help="most optimiser steps, after those of --probe")
    text = "first steps, in which the new parts learn alone (not with head)"
    add("--probe", type=int, metavar="N", help=text)
    add("--learning-rate", type=float, metavar="RATE", help="of what is new")
    add("--rank", type=int, metavar="N", help="of lora's adapters")
    add("--tolerance", type=float, default=2.0, metavar="MM", help="of the surface Dice")
    add("--seed", type=int, default=1, help="of splits and training (default: %(default)s)")
    add("--name", help="of the new model")
    add_device(verb)
    add_json(verb)
    intermix(verb)


def _described() -> str:
    """A line for each method, wrapped."""
    width = max(map(len, METHODS))
    return "\n".join(f"  {name:<{width}}  {each.summary}" for name, each in METHODS.items())


def run(args: argparse.Namespace) -> int:
    """Teach the classes, and print where the result lies; return the exit code.

    Raises:
        UsageError: An option names a class that is not given; or see `finetune`.
    """
    from foundation.tuning.finetune import finetune

    tuned = finetune(
        args.model,
        args.data,
        new_classes(args),
        output=args.output,
        method=args.method,
        test=args.test,
        validation=args.validation,
        seed=args.seed,
        device=args.device,
        protect=args.protect,
        tolerance_mm=args.tolerance,
        name=args.name,
        progress=not args.quiet,
        steps=args.steps,
        probe=args.probe,
        learning_rate=args.learning_rate,
        rank=args.rank,
    )
    if not prints_results():
        return 0
    if args.json:
        print_json(tuned.summary())
        return 0
    if not args.quiet:
        say(f"{tuned.table()}\nReport: {tuned.report}\nSaved to:")
    print(tuned.saved)
    return 0


def new_classes(args: argparse.Namespace) -> list[Any]:
    """Return the classes of the command line as `NewClass`.

    Raises:
        UsageError: A label, prompt or parent is of a class that is not given.
    """
    from foundation.data.naming import NewClass

    labels = [_of_class("--label", text, args.classes) for text in args.label]
    prompts = dict(_of_class("--prompt", text, args.classes) for text in args.prompt)
    of_one = [text for text in args.parent if "=" in text]
    parents = dict(_of_class("--parent", text, args.classes) for text in of_one)
    of_all = next((text for text in args.parent if "=" not in text), None)
    return [
        NewClass(
            name,
            prompt=prompts.get(name),
            parent=parents.get(name, of_all),
            labels=tuple(label for each, label in labels if each == name),
        )
        for name in args.classes
    ]


def _of_class(option: str, text: str, classes: list[str]) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and value) or name not in classes:
        raise UsageError(
            f"Cannot read {option} {text!r}; give CLASS=VALUE, with a class of "
            f"{', '.join(classes)}."
        )
    return name, value
