"""Fixtures shared by all tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# One of several test processes leaves the other cores to the others. torch reads this when it is
# imported, and so do the commands that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def heard_signals() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored; tests of signals send it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def open_data() -> Path:
    """The folder of open CTs, or a skip: the core of the suite never needs it."""
    folder = Path(os.environ.get("UNIVERSAL_CT_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"open CT data not found at {folder}; set UNIVERSAL_CT_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three generated, differently labelled datasets; not to be written to."""
    from tiny_store import write_store

    return write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def unbroken(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pretraining run that was not interrupted; not to be written to."""
    from tiny_runs import go
    from tiny_store import tiny_config

    run = tmp_path_factory.mktemp("unbroken") / "run"
    go(tiny_config(store), run)
    return run
