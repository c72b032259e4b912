"""SIGINT and SIGTERM that stop long work where it is safe, instead of wherever they arrive.

    with stopping_when_safe():
        for window in windows:
            check()  # raises Interrupted once a signal has come
            ...

Python raises KeyboardInterrupt at whatever runs then. In a callback of the garbage collector it is
printed and forgotten, and SIGTERM ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_arrived: int | None = None
_watching = False


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop, and the work stopped where it was safe.

    Attributes:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that the signal ended: 130 or 143."""
        return 128 + self.number


@contextmanager
def stopping_when_safe(notice: str = "") -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for `check`, until the block ends.

    A second SIGINT ends the process at once, as SIGKILL would, also within a library. Outside of
    the main thread, where Python allows no handlers, and within another such block this does
    nothing. The handlers from before are put back.

    Args:
        notice: What to print on standard error when a signal arrives.
    """
    global _arrived, _watching
    if _watching or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in _SIGNALS}

    def arrive(number: int, _: FrameType | None) -> None:
        global _arrived
        _arrived = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if notice:  # print() cannot be entered twice, and this may have interrupted one
            os.write(2, f"{notice}\n".encode())

    # One that is ignored stays so: nohup and background jobs of a shell ask for that.
    for each in (each for each in _SIGNALS if before[each] is not signal.SIG_IGN):
        signal.signal(each, arrive)
    _arrived, _watching = None, True
    try:
        yield
    finally:
        _watching = False
        for each, handler in before.items():
            if handler is not None:  # None: set by another language, and not ours to put back
                signal.signal(each, handler)


def check() -> None:
    """Stop here if a signal has come.

    Raises:
        Interrupted: It has, within `stopping_when_safe`.
    """
    if _watching and _arrived is not None:
        raise Interrupted(_arrived)
