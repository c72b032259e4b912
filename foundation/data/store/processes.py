"""Work in processes of one thread each, of which one may die without costing the others."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import TypeVar

from foundation.errors import UsageError

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")

# Spawned, not forked: the caller may hold threads and locks that a fork would copy.
CONTEXT = multiprocessing.get_context("spawn")
_NO_GUARD = (
    "Each worker process runs your script anew as it starts. Put what the script does under "
    '`if __name__ == "__main__":`, or give workers=1.'
)


def in_processes(
    work: Callable[[Job], Outcome], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Outcome | None]]:
    """Do jobs in several processes, one of which may die.

    When a process dies (out of memory, a crash in a library), nobody knows at which job: those that
    were left then run one at a time, each in a process of its own.

    Args:
        work: Is given a job; it and the jobs must be picklable.
        jobs: What to do.
        workers: How many processes.

    Yields:
        Each job with its outcome, as they come; None where its process died.

    Raises:
        UsageError: No process came up, as where the caller's script has no main guard.
    """
    left = dict(enumerate(jobs))
    started = CONTEXT.Event()
    try:
        for number, outcome in _pooled(work, left, min(workers, len(left)), started):
            yield left.pop(number), outcome
    except BrokenProcessPool as error:
        if not started.is_set():
            raise UsageError(f"No worker process came up. {_NO_GUARD}") from error
    for number, job in list(left.items()):
        try:
            ((_, alone),) = _pooled(work, {number: job}, 1, started)
        except BrokenProcessPool:
            yield job, None
        else:
            yield job, alone


def refuse_while_starting() -> None:
    """Refuse to start processes out of one that is itself still running the caller's script anew.

    Raises:
        UsageError: This is such a process: the script has no main guard.
    """
    # What multiprocessing's own check asks; its error would come after the data were searched.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UsageError(f"This is a worker process that is starting. {_NO_GUARD}")


def _pooled(
    work: Callable[[Job], Outcome], jobs: Mapping[int, Job], workers: int, started: Event
) -> Iterator[tuple[int, Outcome]]:
    with _single_threaded():
        pool = ProcessPoolExecutor(
            workers, mp_context=CONTEXT, initializer=_begin, initargs=(started,)
        )
        try:
            numbers = {pool.submit(work, job): number for number, job in jobs.items()}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Processes started here use one thread each: there are as many of them as wanted cores."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def _begin(started: Event) -> None:
    """Tell that a worker process is up, and let it end when its parent was killed."""
    started.set()
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
