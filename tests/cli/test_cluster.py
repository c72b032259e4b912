"""`segment --cluster`: jobs that share a folder, of which any may die."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batches import write_scans
from tiny import tiny_model

from foundation.cli.main import main
from foundation.hub.saved import save_pretrained

RUN_FILES = {"universal-ct.jsonl", "universal-ct.log"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pretrained(tiny_model(), tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def segment(model_folder: str, tmp_path: Path) -> Callable[..., int]:
    def command(*args: str) -> int:
        where = ("-o", str(tmp_path / "out"), "-m", model_folder, "--device", "cpu")
        return main(["segment", str(tmp_path / "data"), *where, *args])

    return command


Segment = Callable[..., int]


def masks(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/segmentation.nii.gz")}


def test_what_is_wrong_is_said_before_a_job_is_made(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scans(tmp_path / "data", 1, 0)
    for options, said in (
        (("--cluster", "local", "--jobs", "0"), "give --jobs 1 or more"),
        (("--cluster", "local", "--part", "1/2"), "and no --part"),
        (("--cluster", "local", "--job-option", "timeout"), "is no NAME=VALUE"),
        (("--cluster", "pbs"), "invalid choice"),
    ):
        assert segment(*options) == 2
        assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(("kind", "package"), [("local", "submitit"), ("ray", "ray")])
def test_the_extra_is_named_where_it_is_missing(
    kind: str,
    package: str,
    segment: Segment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    write_scans(tmp_path / "data", 1, 0)
    assert segment("--cluster", kind) == 1
    assert "pip install 'universal-ct[cluster]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "package"), [("local", "submitit"), ("ray", "ray")])
def test_jobs_make_what_one_process_makes(
    kind: str,
    package: str,
    segment: Segment,
    model_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(package)
    bad = write_scans(tmp_path / "data", 4, 1)
    alone = ("-o", str(tmp_path / "alone"), "-m", model_folder, "--device", "cpu", "-q")
    assert main(["segment", str(tmp_path / "data"), *alone]) == 3
    capsys.readouterr()
    assert segment("--cluster", kind, "--jobs", "2", "--json", "-q") == 3
    results = json.loads(capsys.readouterr().out)["results"]
    status = {each["case"]: each["status"] for each in results}
    assert len(status) == 5 and [name for name in status if status[name] == "failed"] == bad
    assert masks(tmp_path / "out") == masks(tmp_path / "alone")
    names = set(status) - set(bad)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*RUN_FILES, *names}
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out", "alone"}
    assert segment("--cluster", kind, "--jobs", "2", "-q", "--skip-existing", "-c", "liver") == 1


@pytest.mark.slow
def test_the_death_of_a_job_costs_nothing(
    segment: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    write_scans(tmp_path / "data", 6, 0)
    killed: list[int] = []

    def kill_one() -> None:
        """The process that works on the first case that is started."""
        manifest, until = tmp_path / "out" / "universal-ct.jsonl", time.monotonic() + 120
        while time.monotonic() < until and not killed:
            time.sleep(0.01)
            for claim in (tmp_path / "out").glob(".universal-ct-*.claim"):
                found = _holder(claim)
                if found and manifest.exists() and '"started"' in manifest.read_text():
                    os.kill(found, signal.SIGKILL)
                    killed.append(found)
                    return

    thread = threading.Thread(target=kill_one)
    thread.start()
    code = segment("--cluster", "local", "--jobs", "2", "--json")
    thread.join()
    assert killed, "no job was met at work"
    said = capsys.readouterr()
    assert code == 0 and "1 of 2 jobs died" in said.err
    results: list[dict[str, Any]] = json.loads(said.out)["results"]
    assert {each["case"] for each in results} == {f"case{number:02}" for number in range(6)}
    assert {each["status"] for each in results} <= {"done", "skipped"}
    assert len(masks(tmp_path / "out")) == 6
    assert not list((tmp_path / "out").glob(".*"))


def _holder(claim: Path) -> int | None:
    """The process that has a file open, on Linux."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            links = [os.readlink(each) for each in (entry / "fd").iterdir()]
        except OSError:
            continue
        if str(claim) in links:
            return int(entry.name)
    return None
