"""Work in processes of one thread each, of which one may die without costing the others."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def in_processes(
    work: Callable[[Job], Outcome], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Outcome | None]]:
    """Give each job with its outcome as they come; None where its process died.

    When a process dies (out of memory, a crash in a library), nobody knows at which job: those that
    were left then run one at a time, each in a process of its own.
    """
    left = dict(enumerate(jobs))
    try:
        for number, outcome in _pooled(work, left, min(workers, len(left))):
            yield left.pop(number), outcome
    except BrokenProcessPool:
        pass
    for number, job in list(left.items()):
        try:
            ((_, alone),) = _pooled(work, {number: job}, 1)
        except BrokenProcessPool:
            yield job, None
        else:
            yield job, alone


def _pooled(
    work: Callable[[Job], Outcome], jobs: Mapping[int, Job], workers: int
) -> Iterator[tuple[int, Outcome]]:
    # Spawned, not forked: the caller may hold threads and locks that a fork would copy.
    context = multiprocessing.get_context("spawn")
    with _single_threaded():
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
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
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _end_with_parent() -> None:
    """Let a worker process end when its parent was killed, instead of waiting for it for ever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
