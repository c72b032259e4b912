"""Many CTs through one network: segment each, leave its files, and lose none.

For each CT these are the masks, `volumes.csv`, `segmentation.json` and, if wanted, `preview.png`;
see `Segmentation.save`. Several processes may fill one folder, see `foundation.inference.claims`.
What was done is noted in a manifest, see `foundation.inference.manifest`.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from foundation import interrupt
from foundation.errors import UniversalCTError, UsageError, VolumeError
from foundation.files import file_sha256
from foundation.imaging.sidecar import Sidecar
from foundation.inference.cases import Case, find_cases, part_of
from foundation.inference.claims import claimed
from foundation.inference.manifest import Manifest, manifest_path, peak_memory_mib
from foundation.inference.outcomes import Outcome

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from foundation.imaging.result import Layout
    from foundation.imaging.trust import Trust
    from foundation.inference.options import FolderOptions, InferenceOptions
    from foundation.inference.request import Request
    from foundation.networks.protocol import Network

Existing = Literal["refuse", "skip", "overwrite"]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # the next CT would meet it too
_DEATHS = 2  # after so many in a row, a case is set aside


def segment_folder(
    network: Network,
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    existing: Existing = "refuse",
    report: Callable[[Outcome], None] | None = None,
    part: str | None = None,
    retry: bool = False,
    manifest: str | Path | None = None,
    names: bool = False,
    **options: Unpack[FolderOptions],
) -> list[Outcome]:
    """Segment many CTs and save each result; a CT that fails does not stop the others.

    SIGINT and SIGTERM end it between two windows: what is finished is kept, and nothing is left
    half-written. A killed run goes on where it was with `existing="skip"`.

    Args:
        network: A model of `from_pretrained`, or any network that `segment_volume` takes.
        inputs: Files and folders, see `find_cases`.
        output: Folder that receives a folder for each CT; for one CT also a file name.nii.gz.
        existing: What to do where results are already: "refuse", "skip" those CTs, or "overwrite".
            Only what has been made from the same CT, weights, classes, options and version is
            skipped; where there is another result, the case fails.
        report: Called with the outcome of each CT when it is known.
        part: "2/8", the second of eight jobs that share the CTs; all of them if not given.
        retry: Also take up cases in which the process has died twice in a row.
        manifest: Where the run is noted, as JSON lines; `universal-ct.jsonl` in the output folder
            if not given, and nowhere where `output` is a file. A log lies beside it.
        names: Also note the names of cases and the paths of their CTs, which may name patients.
        **options: classes, device, overlap, postprocess and progress as of `segment_volume`; layout
            and preview as of `Segmentation.save`.

    Returns:
        What became of each CT, in the order of `find_cases`.

    Raises:
        UsageError: See `find_cases`, `part_of` and `still_to_do`; or a class or an option is
            unknown, or `manifest` is another file.
        Interrupted: By a signal; it is a KeyboardInterrupt. `report` has had what was done.
        OSError: The manifest cannot be written.
    """
    given = [inputs] if isinstance(inputs, str | Path) else inputs
    cases = find_cases(given, output)
    where = manifest or manifest_path(output)
    run = Running(
        existing=existing,
        retry=retry,
        manifest=Manifest(where, names=names) if where else None,
        part=part,
    )
    outcomes = {}
    with interrupt.stopping_when_safe():
        for outcome in segment_cases(network, cases, run, **options):
            outcomes[outcome.case] = outcome
            if report:
                report(outcome)
    return [outcomes[case.name] for case in run.chosen(cases)]


@dataclass(frozen=True)
class Running:
    """How a batch runs, as opposed to what it makes.

    Attributes:
        existing: See `segment_folder`.
        retry: See `segment_folder`.
        part: See `segment_folder`.
        manifest: Where the run is noted; None, nowhere.
        debug: Raise whatever goes wrong with a CT.
    """

    existing: Existing = "refuse"
    retry: bool = False
    part: str | None = None
    manifest: Manifest | None = None
    debug: bool = False

    def chosen(self, cases: Sequence[Case]) -> list[Case]:
        """Return the cases of this part.

        Raises:
            UsageError: See `part_of`.
        """
        return part_of(cases, self.part) if self.part else list(cases)

    def deaths(self, case: Case) -> int:
        """Return how many times in a row the process has died in a case."""
        return 0 if self.retry or self.manifest is None else self.manifest.deaths(case)


def still_to_do(cases: Sequence[Case], existing: Existing) -> list[Case]:
    """Return the cases to segment, given what is there already.

    Args:
        cases: From `find_cases`.
        existing: See `segment_folder`.

    Returns:
        Those without results; all of them if `existing` is "overwrite". Whether a result is the
        one that is wanted, is not looked at.

    Raises:
        UsageError: Results are there and `existing` is "refuse"; or files are there that no result
            of ours names, which are never replaced.
    """
    for case in cases:
        case.files.refuse_foreign()
    done = [case for case in cases if case.files.done]
    if done and existing == "refuse":
        more = f" and {len(done) - 1} more" if len(done) > 1 else ""
        raise UsageError(
            f"{done[0].output}{more} already holds a segmentation. "
            "Add --overwrite or --skip-existing, or give another -o."
        )
    return [case for case in cases if existing == "overwrite" or case not in done]


def segment_cases(
    network: Network | None,
    cases: Sequence[Case],
    run: Running | None = None,
    **options: Unpack[FolderOptions],
) -> Iterator[Outcome]:
    """Segment cases one after the other; whatever goes wrong with one must not cost the others.

    A full or read-only disk ends it, since all that follows would be computed in vain: the cases
    that are left fail without being tried.

    Args:
        network: See `segment_folder`; None where no CT exists.
        cases: From `find_cases`.
        run: How it runs.
        **options: See `segment_folder`.

    Yields:
        What became of each CT, in the order of `cases`; at the end, those in which an earlier run
        died, and those that another process had claimed: it may have died since.

    Raises:
        UsageError: See `part_of` and `still_to_do`; or the request is wrong for every CT.
        Interrupted: A signal came, see `foundation.interrupt`.
        OSError: The manifest cannot be written.
    """
    run = run or Running()
    cases = run.chosen(cases)
    still_to_do(cases, run.existing)
    if network is None:
        yield from (_failed(case, _missing(case)) for case in cases)
        return
    from foundation.inference.request import Request

    makes = {name: value for name, value in options.items() if name not in ("device", "progress")}
    batch = _Batch(network, Request.of(network, **makes), run, options)  # type: ignore[arg-type]
    batch.earlier.update((case, _stamp(case)) for case in cases)
    if run.manifest:
        run.manifest.begin(batch.request, cases, run.part)
    later = []
    for case in cases:
        outcome = None if run.deaths(case) else batch.outcome(case)
        if outcome is None or outcome.status == "claimed":
            later.append(case)
        else:
            yield outcome
    for case in later:
        yield batch.outcome(case)


@dataclass
class _Batch:
    """The work on cases, and what it needs to know of those before."""

    network: Network
    request: Request
    run: Running
    options: FolderOptions
    earlier: dict[Case, object] = field(default_factory=dict)
    no_room: str = ""

    def outcome(self, case: Case) -> Outcome:
        """What becomes of a case.

        Raises:
            UsageError: The request is wrong for every CT.
            Interrupted: A signal came.
        """
        interrupt.check()
        if self.no_room:
            return self._noted(case, _failed(case, f"not tried, because of {self.no_room}"))
        if not case.ct.exists():
            return self._noted(case, _failed(case, _missing(case)))
        start = time.monotonic()
        try:
            with claimed(case.files.claim) as taken:
                if taken is None:
                    return self._make(case)
            return Outcome(case.name, str(case.ct), "claimed", error=taken)
        except UsageError:
            raise  # the request itself is wrong, for every CT
        except Exception as error:
            if self.run.debug:
                raise
            expected = isinstance(error, UniversalCTError | OSError)
            reason = str(error) if expected else f"{type(error).__name__}: {error} (see --debug)"
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                self.no_room = reason
            failed = replace(
                _failed(case, reason),
                seconds=round(time.monotonic() - start, 1),
                peak_memory_mib=peak_memory_mib(),
            )
            with suppress(OSError):  # which content it was that failed
                if case.ct.is_file():
                    failed = replace(failed, ct_sha256=file_sha256(case.ct))
            return self._noted(case, failed)

    def _make(self, case: Case) -> Outcome:
        manifest = self.run.manifest
        case.files.clear_hidden()
        found = case.files.whole()
        # A result that was not there at the start is one that another process of this batch made.
        is_new = _stamp(case) != self.earlier[case]
        if found is not None and (self.run.existing == "skip" or is_new):
            different = self.request.difference(found, case.ct)
            return self._noted(case, _otherwise(case, different) or _skipped(case, found))
        if self.run.deaths(case) >= _DEATHS:
            if manifest:
                manifest.set_aside(case)
            return _failed(
                case,
                f"set aside: the process died {_DEATHS} times in a row in this case, perhaps for "
                "want of memory. Add --retry to take it up again.",
            )
        if manifest:
            manifest.started(case)
        try:
            sha256 = self.request.model_sha256
            done = segment_case(self.network, case, model_sha256=sha256, **self.options)
        except BaseException as error:
            # Or it would stand for a process that died in this case.
            ends_it = isinstance(error, UsageError) or not isinstance(error, Exception)
            if manifest and (ends_it or self.run.debug):
                manifest.stopped(case, error)
            raise
        return self._noted(case, done)

    def _noted(self, case: Case, outcome: Outcome) -> Outcome:
        if self.run.manifest:
            self.run.manifest.finished(case, outcome)
        return outcome


def segment_case(
    network: Network,
    case: Case,
    *,
    classes: str | Sequence[str] | None = None,
    layout: Layout = "multilabel",
    preview: bool = False,
    model_sha256: str | None = None,
    **options: Unpack[InferenceOptions],
) -> Outcome:
    """Segment one CT and write its files.

    Args:
        network: See `segment_folder`.
        case: The CT and where its results go.
        classes: As of `segment_volume`.
        layout: As of `Segmentation.save`.
        preview: As of `Segmentation.save`.
        model_sha256: Of the weights, for the sidecar; the network's own if not given.
        **options: As of `segment_volume`.

    Returns:
        What was written and found.

    Raises:
        VolumeError: The CT cannot be read, or was replaced meanwhile.
        UsageError: A class or an option is unknown.
        OSError: A file cannot be written.
    """
    from foundation.inference.predict import segment_volume

    start = time.monotonic()
    # Before it is read, which is quicker then; what is no file has no content to compare.
    before = _stat(case.ct) if case.ct.is_file() else None
    ct_sha256 = None if before is None else file_sha256(case.ct)
    segmentation = segment_volume(network, case.ct, classes=classes, **options)
    if before is not None and _stat(case.ct) != before:
        raise VolumeError(f"{case.ct} was changed while it was read. Segment it again.")
    if model_sha256 is not None:
        segmentation = replace(segmentation, model_sha256=model_sha256)
    taken = round(time.monotonic() - start, 1)
    files = segmentation.save(
        case.output,
        layout=layout,
        preview=preview,
        seconds=taken,
        peak_memory_mib=peak_memory_mib(),
        ct_sha256=ct_sha256,
    )
    return Outcome(
        case=case.name,
        ct=str(case.ct),
        status="done",
        files=[str(path) for path in files],
        volumes_ml={name: round(ml, 3) for name, ml in segmentation.volumes_ml.items()},
        truncated=list(segmentation.truncated),
        warnings=list(Sidecar.read(files[-1]).warnings),
        doubts=_doubts(segmentation.trust),
        seconds=round(time.monotonic() - start, 1),
        ct_sha256=ct_sha256,
        peak_memory_mib=peak_memory_mib(),
    )


def _stamp(case: Case) -> object:
    """Something that changes when a result is replaced: a new sidecar is another file."""
    try:
        found = os.stat(case.files.sidecar)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _missing(case: Case) -> str:
    return f"{case.ct} does not exist. Check the path."


def _failed(case: Case, error: str) -> Outcome:
    return Outcome(case.name, str(case.ct), "failed", error=error)


def _otherwise(case: Case, different: str | None) -> Outcome | None:
    if different is None:
        return None
    return _failed(
        case,
        f"{case.output} holds a segmentation that was made {different}. Add --overwrite to do it "
        "again, or give another -o.",
    )


def _skipped(case: Case, found: Sidecar) -> Outcome:
    labels = found.labels.values()
    return Outcome(
        case=case.name,
        ct=str(case.ct),
        status="skipped",
        files=[str(case.files.root / name) for name in (*found.files, case.files.sidecar.name)],
        volumes_ml={label.name: label.volume_ml for label in labels},
        truncated=[label.name for label in labels if label.truncated],
        warnings=list(found.warnings),
        doubts=_doubts(found.quality or {}),
        ct_sha256=found.ct_sha256,
    )


def _doubts(trust: Mapping[str, Trust]) -> dict[str, list[str]]:
    return {name: list(each.doubts) for name, each in trust.items() if each.doubts}


def _stat(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
