"""Signals wait until the work is where it may stop."""

import signal
import subprocess
import sys
import threading

import pytest

from foundation import interrupt
from foundation.interrupt import Interrupted, stopping_when_safe

BOTH = (signal.SIGINT, signal.SIGTERM)


def handlers() -> list[object]:
    return [signal.getsignal(each) for each in BOTH]


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_waits_for_the_check(number: signal.Signals) -> None:
    before, done = handlers(), []
    with pytest.raises(Interrupted, match=number.name) as stop, stopping_when_safe():
        for step in range(5):
            interrupt.check()
            if step == 2:
                signal.raise_signal(number)
            done.append(step)
    assert done == [0, 1, 2], "the step in which it came is finished, and no other is begun"
    assert stop.value.exit_code == 128 + number
    assert isinstance(stop.value, KeyboardInterrupt), "`except Exception` lets it through"
    assert handlers() == before
    interrupt.check()  # it is over


def test_it_cannot_be_lost_in_a_callback() -> None:
    """Python prints and forgets what is raised in a weak reference's callback."""
    with pytest.raises(Interrupted), stopping_when_safe():

        class Thing:
            def __del__(self) -> None:
                signal.raise_signal(signal.SIGINT)

        Thing()
        interrupt.check()


def test_blocks_within_blocks_and_in_threads_change_nothing() -> None:
    before = handlers()
    found: list[list[object]] = []

    def elsewhere() -> None:
        with stopping_when_safe():
            found.append(handlers())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before]
    with pytest.raises(Interrupted), stopping_when_safe():
        with stopping_when_safe():
            signal.raise_signal(signal.SIGTERM)
        interrupt.check()
    assert handlers() == before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with stopping_when_safe():
            signal.raise_signal(signal.SIGINT)
            interrupt.check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("second", BOTH)
def test_a_second_sigint_ends_the_process_at_once(second: signal.Signals) -> None:
    script = (
        "import signal, sys\n"
        "from foundation.interrupt import stopping_when_safe\n"
        "with stopping_when_safe('Stopping.'):\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        f"    signal.raise_signal({int(second)})\n"
        "    sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.startswith("Stopping.\n")
    assert done.returncode == (-signal.SIGINT if second == signal.SIGINT else 7)
