"""The command line: segment, models, info, classes, demo; datasets to pretrain; add-class.

Everything heavy is imported by the verb that needs it: `--help`, `models`, `info` of a known model
and `classes` answer without torch or numpy. Results go to files or, as text or JSON, to standard
output; all else goes to standard error. Exit codes: 0 success, 1 failure, 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.cli.arguments import NOTICE, build_parser
from foundation.errors import UniversalCTError, UsageError
from foundation.files import nifti_stem

if TYPE_CHECKING:
    from foundation.config import NetworkConfig
    from foundation.hub.cards import Card
    from foundation.inference.folder import Case, Outcome, Settings
    from foundation.model import UniversalModel


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a letter the terminal lacks must not end a run
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed help, the version or what is wrong
        return stop.code if isinstance(stop.code, int) else 1
    try:
        with _messages(args):
            code = _VERBS[args.verb](args)
        sys.stdout.flush()
        return code
    except UniversalCTError as error:
        if args.debug:
            raise
        _say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # the reader of a pipe had enough, as in `universal-ct classes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if args.debug:
            raise
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("Interrupted. What was finished is kept; nothing is left half-written.")
        return 130


# --- verbs ------------------------------------------------------------------------------------


def _segment(args: argparse.Namespace) -> int:
    from foundation.inference.folder import Outcome, Settings, find_cases, segment_case, still_to_do

    cases = find_cases(args.ct, args.output)
    todo = still_to_do(cases, overwrite=args.overwrite, skip_existing=args.skip_existing)
    outcomes = {
        case: Outcome(case.name, str(case.ct), "skipped") for case in cases if case not in todo
    }
    settings = Settings(
        classes=_class_list(args.classes),
        device=args.device,
        overlap=args.overlap,
        layout=args.format.replace("-", "_"),
        preview=args.preview,
        progress=not args.quiet,
    )
    model: UniversalModel | None = None
    _check_known_classes(args.model, settings.classes)
    for number, case in enumerate(todo, 1):
        if model is None and case.ct.exists():  # not loaded for the sake of a mistyped path
            model = _load_model(args.model)
            settings = _checked(model, settings)
        outcome = _attempt(segment_case, model, case, settings, args.debug)
        outcomes[case] = outcome
        done = outcome.status == "done"
        found = sum(ml > 0 for ml in outcome.volumes_ml.values())
        what = f"{found} structures in {outcome.seconds:g} s, saved to {case.output}"
        line = f"[{number}/{len(todo)}] {case.name}: {what if done else f'error: {outcome.error}'}"
        if not (done and args.quiet):
            _say(line)
    results = [outcomes[case] for case in cases]
    failed = sum(outcome.status == "failed" for outcome in results)
    if args.json:
        _print_json({"model": args.model, "results": [asdict(each) for each in results]})
    elif len(cases) > 1 and not args.quiet:
        skipped = sum(outcome.status == "skipped" for outcome in results)
        _say(f"{len(cases) - failed - skipped} done, {skipped} skipped, {failed} failed.")
    return 1 if failed else 0


def _attempt(
    work: Callable[[UniversalModel, Case, Settings], Outcome],
    model: UniversalModel | None,
    case: Case,
    settings: Settings,
    debug: bool,
) -> Outcome:
    """Segment one CT; whatever goes wrong with it must not cost the others."""
    from foundation.inference.folder import Outcome

    if model is None:
        return Outcome(
            case.name, str(case.ct), "failed", error=f"{case.ct} does not exist. Check the path."
        )
    try:
        return work(model, case, settings)
    except UsageError:
        raise  # the request itself is wrong, for every CT
    except Exception as error:
        if debug:
            raise
        expected = isinstance(error, UniversalCTError | OSError)
        reason = str(error) if expected else f"{type(error).__name__}: {error} (see --debug)"
        return Outcome(case.name, str(case.ct), "failed", error=reason)


def _datasets(args: argparse.Namespace) -> int:
    from foundation.cli.datasets import run

    return run(args)


def _prepare(args: argparse.Namespace) -> int:
    from foundation.cli.prepare import run

    return run(args)


def _pretrain(args: argparse.Namespace) -> int:
    from foundation.cli.pretrain import run

    return run(args)


def _add_class(args: argparse.Namespace) -> int:
    from foundation.cli.add_class import run

    return run(args)


def _models(args: argparse.Namespace) -> int:
    from foundation.hub.cards import list_models

    models = list_models()
    if args.json:
        _print_json([asdict(model) for model in models])
        return 0
    header = ("name", "backbone", "classes", "parameters", "licence", "where")
    rows = [
        (m.name, m.backbone, f"{m.classes}", f"{m.parameters / 1e6:.1f} M", m.licence, m.where)
        for m in models
    ]
    print(_table([header, *rows]))
    return 0


def _info(args: argparse.Namespace) -> int:
    from foundation.config import ModelConfig
    from foundation.taxonomy import NAMES

    card, config = _described(args.model)
    if args.json:
        content: dict[str, Any] = {"name": card.name, "card": dict(card.metadata)}
        if config is not None:
            content["config"] = json.loads(config.to_json())
        _print_json({**content, "text": card.text})
        return 0
    about = card.weights
    names = config.class_names if config else ()
    if config is None and card.source:
        names = NAMES  # published weights get their configuration when converted: all the classes
    where = f"{card.source.repo}: {card.source.file}" if card.source else None
    facts: list[tuple[str, Any]] = [
        ("model", card.name),
        ("summary", about.get("summary")),
        ("backbone", about.get("backbone")),
        ("parameters", about.get("parameters")),
        ("licence", card.licence),
        ("classes", about.get("classes")),
        ("names", ", ".join(names) or None),
        ("source", where),
    ]
    if config is not None:
        pre = config.preprocessing
        facts += [
            ("text encoder", config.text.encoder if isinstance(config, ModelConfig) else None),
            ("spacing", " × ".join(f"{mm:g}" for mm in pre.spacing_mm) + " mm"),
            ("windows", ", ".join(f"{low:g} to {high:g} HU" for low, high in pre.hu_windows)),
            ("patch", " × ".join(map(str, pre.patch_size)) + " voxels"),
            ("overlap", f"{pre.overlap:g}"),
            ("threshold", f"{pre.threshold:g}"),
        ]
    print("\n".join(f"{name + ':':<14}{value}" for name, value in facts if value is not None))
    print(f"\n{card.text.rstrip()}")
    return 0


def _classes(args: argparse.Namespace) -> int:
    from foundation.taxonomy import CLASSES

    if args.json:
        kinds = {c.name: {"kind": c.kind, "laterality": c.laterality} for c in CLASSES}
        _print_json([{**asdict(c), **kinds[c.name]} for c in CLASSES])
        return 0
    header = ("index", "name", "display", "parent", "SNOMED CT", "also called")
    rows = [
        (f"{c.index}", c.name, c.display, c.parent or "", c.snomed or "", ", ".join(c.aliases))
        for c in CLASSES
    ]
    print(_table([header, *rows]))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from foundation.hub.example import prepare_ct
    from foundation.inference.folder import Case, Settings, segment_case, still_to_do, volume_table

    output = Path(args.output)
    if nifti_stem(output) is not None or (output.exists() and not output.is_dir()):
        raise UsageError(f"{output} is a file, not a folder. Give -o a folder.")
    case = Case("demo", Path(args.ct or ""), output)
    still_to_do([case], overwrite=True, skip_existing=False)  # raises where others' masks lie
    model = _load_model(args.model)
    settings = Settings(device=args.device, preview=True, progress=not args.quiet)
    settings = _checked(model, settings)
    ct, what = prepare_ct(output, ct=args.ct, phantom=args.phantom, seed=args.seed)
    if not args.quiet:
        _say(what)
    outcome = segment_case(model, replace(case, ct=ct), settings)
    print(volume_table(outcome))
    if not args.quiet:
        _say(f"\nSegmented by {args.model} in {outcome.seconds:g} s. See {output}:")
        files = [str(ct), *outcome.files]
        _say("\n".join(f"  {os.path.relpath(file, output)}" for file in files))
        _say(NOTICE)
    return 0


# --- what the verbs share -----------------------------------------------------------------------


def _load_model(name: str) -> UniversalModel:
    from foundation.hub.load import from_pretrained

    return from_pretrained(name)


def _checked(model: UniversalModel, settings: Settings) -> Settings:
    """Settings with a device of this machine, once it is known that the model has the classes."""
    from foundation.hardware import keep_freed_memory
    from foundation.inference.predict import choose_device, resolve_classes

    resolve_classes(settings.classes, model.classes)
    device = str(choose_device(settings.device))
    if device == "cpu":
        keep_freed_memory()  # a third of the time
    return replace(settings, device=device)


def _check_known_classes(model: str, classes: Sequence[str] | None) -> None:
    """Find a mistyped class before a large model is downloaded: all with a card have the 32."""
    from foundation import taxonomy
    from foundation.hub import cards

    if model in cards.card_names():
        for name in classes or ():
            taxonomy.resolve(name)


def _class_list(given: list[str] | None) -> list[str] | None:
    """Names separated by spaces or commas."""
    if given is None:
        return None
    return [name.strip() for each in given for name in each.split(",") if name.strip()]


def _described(name: str) -> tuple[Card, NetworkConfig | None]:
    """A model's card, and its configuration where that is on this machine; without its weights."""
    from foundation.config import read_config
    from foundation.hub.cards import Card, card_names, read_card

    folder = Path(name).expanduser()
    if name in card_names():
        card = read_card(name)
        folder = card.folder
    elif folder.is_dir():
        path = folder / "README.md"
        if not path.is_file():
            raise UsageError(f"{folder} is no saved model: it has no README.md.")
        card = Card.parse(folder.name, path.read_text(encoding="utf-8"), str(path))
    else:
        from foundation.hub.load import model_card

        return model_card(name), None
    path = folder / "config.json"
    if not path.is_file():
        return card, None
    return card, read_config(path.read_text(encoding="utf-8"), str(path))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, default=str))


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


@contextmanager
def _messages(args: argparse.Namespace) -> Iterator[None]:
    """Our warnings and notices as plain lines on standard error; other libraries' with --debug."""
    logger = logging.getLogger("foundation")
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.ERROR if args.quiet else logging.WARNING)
    logger.addHandler(handler)

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if args.debug or (category.__module__.startswith("foundation") and not args.quiet):
            _say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always" if args.debug else "default")
        warnings.showwarning = show
        try:
            yield
        finally:
            logger.removeHandler(handler)


_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "segment": _segment,
    "models": _models,
    "info": _info,
    "classes": _classes,
    "demo": _demo,
    "datasets": _datasets,
    "prepare": _prepare,
    "pretrain": _pretrain,
    "add-class": _add_class,
}

if __name__ == "__main__":
    raise SystemExit(main())
