"""`universal-ct segment --cluster`: the same work in jobs of a cluster, of which any may die.

Each job is a part of the cases (`--part`), and all write into one folder. What a job that died has
left is taken up by the same part, submitted again: claims and sidecars tell what is left, and the
manifest sets a case aside that killed its process twice.
"""

from __future__ import annotations

import argparse
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.cli.batch import running_of, segmented
from foundation.cli.shared import messages, say
from foundation.errors import UniversalCTError, UsageError, import_extra

if TYPE_CHECKING:
    from foundation.inference.cases import Case
    from foundation.inference.outcomes import Outcome

_ROUNDS = 5  # a part is submitted so often at most

Result = dict[str, Any]
Submit = Callable[[Mapping[str, Any], Sequence[str]], Iterator[tuple[str, "Result | None"]]]


def in_jobs(args: argparse.Namespace, cases: Sequence[Case]) -> Iterator[Outcome]:
    """Segment cases in jobs, and wait for them.

    Args:
        args: Of the command, which was checked.
        cases: What is to be segmented.

    Yields:
        What became of each CT, as the jobs end.

    Raises:
        UsageError: An option is wrong, or the jobs say so of the request.
        MissingExtraError: submitit or Ray is not installed.
    """
    from foundation.inference.outcomes import Outcome

    if args.jobs < 1 or args.part:
        raise UsageError("--cluster makes the parts itself: give --jobs 1 or more, and no --part.")
    options = _options(args.job_option)
    count = min(args.jobs, len(cases))
    left = [f"{number}/{count}" for number in range(1, count + 1)]
    values = {**vars(args), "cluster": None, "quiet": True, "json": False, "debug": False}
    values |= {"ct": [os.path.abspath(ct) for ct in args.ct]}  # jobs may begin in another folder
    for name in ("output", "model", "manifest"):
        if values[name] and (name != "model" or os.path.exists(args.model)):
            values[name] = os.path.abspath(values[name])
    if not args.overwrite:  # the command has refused what was there; now there is what jobs made
        values["skip_existing"] = True
    known: dict[str, Outcome] = {}
    with _folder(Path(args.output)) as folder:
        submit = _by_ray(options) if args.cluster == "ray" else _by_submitit(args, folder, options)
        for _ in range(_ROUNDS):
            died, refused = [], []
            for part, result in submit(values, left):
                if result is None or result["error"]:
                    died.append(part)
                    refused += [result] if result else []
                    continue
                for each in result["outcomes"]:
                    known[each["case"]] = Outcome(**each)
                    yield known[each["case"]]
            if not died:
                break
            if (
                len(refused) == len(left) and not known
            ):  # it is not one machine that lacks something
                first = refused[0]
                raise (UsageError if first["usage"] else UniversalCTError)(first["error"])
            say(f"{len(died)} of {count} jobs died: {', '.join(died)}.")
            for result in refused:
                say(f"error: {result['error']}")
            left = died
    for case in cases:
        if case.name not in known:
            text = f"its job died {_ROUNDS} times. Add --skip-existing to go on where it was."
            yield Outcome(case.name, str(case.ct), "failed", error=text)


def work(values: Mapping[str, Any], part: str) -> Result:
    """Do one part, in a job.

    Args:
        values: The command's arguments by name.
        part: "2/8".

    Returns:
        `outcomes` of its cases; `error`, where the part cannot be done at all, and whether that is
        the request's fault, `usage`.
    """
    from foundation.inference.cases import find_cases

    args = argparse.Namespace(**{**values, "part": part})
    try:
        running = running_of(args)
        with messages(args):
            outcomes = [*segmented(args, running, find_cases(args.ct, args.output))]
    except (UniversalCTError, OSError) as error:
        return {"outcomes": [], "error": str(error), "usage": isinstance(error, UsageError)}
    return {"outcomes": [asdict(each) for each in outcomes], "error": "", "usage": False}


def _options(given: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not (name and equals):
            raise UsageError(f"--job-option {each!r} is no NAME=VALUE, such as timeout_min=600.")
        options[name] = int(value) if value.isdigit() else value
    return options


@contextmanager
def _folder(output: Path) -> Iterator[Path]:
    """A hidden folder for what the scheduler writes, where all machines see it."""
    made = [each for each in (output.parent, *output.parent.parents) if not each.exists()]
    folder = output.parent / f".universal-ct-jobs-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for each in made:
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()


def _by_submitit(args: argparse.Namespace, folder: Path, options: Mapping[str, Any]) -> Submit:
    submitit = import_extra("submitit", "cluster", f"--cluster {args.cluster} needs")
    executor = submitit.AutoExecutor(folder=folder, cluster=args.cluster)
    try:
        executor.update_parameters(name="universal-ct", **options)
    except (NameError, TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"submitit refuses a --job-option: {error}") from error

    def submit(
        values: Mapping[str, Any], parts: Sequence[str]
    ) -> Iterator[tuple[str, Result | None]]:
        with executor.batch():
            jobs = [executor.submit(work, values, part) for part in parts]
        try:
            for part, job in zip(parts, jobs, strict=True):
                try:
                    result = job.result()
                except Exception:  # it left no result: killed, out of time, or the node is gone
                    result = None
                yield part, result
        except BaseException:
            for job in jobs:
                job.cancel(check=False)
            raise

    return submit


def _by_ray(options: Mapping[str, Any]) -> Submit:
    ray = import_extra("ray", "cluster", "--cluster ray needs")
    if not ray.is_initialized():
        ray.init(log_to_driver=False)  # at RAY_ADDRESS, or on this machine
    try:
        # One task a process: what a task leaves behind, a claim too, ends with it.
        task = ray.remote(max_retries=0, max_calls=1, **options)(work)
    except (TypeError, ValueError) as error:
        raise UsageError(f"Ray refuses a --job-option: {error}") from error

    def submit(
        values: Mapping[str, Any], parts: Sequence[str]
    ) -> Iterator[tuple[str, Result | None]]:
        jobs = [task.remote(values, part) for part in parts]
        try:
            for part, job in zip(parts, jobs, strict=True):
                try:
                    result = ray.get(job)
                except ray.exceptions.RayError:
                    result = None
                yield part, result
        except BaseException:
            for job in jobs:
                ray.cancel(job)
            raise

    return submit
