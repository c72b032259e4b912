"""A batch that is killed, resumed, shared and split: nothing is lost, and no mask is another."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import write_scan, write_scans
from conftest import REPOSITORY
from thresholds import ThresholdNetwork

import foundation
from foundation.errors import UsageError
from foundation.imaging.sidecar import Sidecar
from foundation.inference import folder
from foundation.inference.cases import find_cases, part_of
from foundation.inference.claims import claimed
from foundation.inference.folder import Running, segment_cases, segment_folder
from foundation.inference.manifest import Manifest
from foundation.inference.outcomes import Outcome, exit_code
from foundation.inference.request import weights_sha256

RUN_FILES = {"universal-ct.jsonl", "universal-ct.log"}


@pytest.fixture
def network() -> ThresholdNetwork:
    return ThresholdNetwork(patch=(16, 16, 16), spacing_mm=(6.0, 6.0, 6.0))


def segment(network: Any, data: Path, out: Path, **options: Any) -> list[Outcome]:
    return segment_folder(network, data, out, progress=False, **options)


def results(out: Path) -> dict[str, Any]:
    """Every file of the cases; of sidecars, what does not depend on the moment."""
    found: dict[str, Any] = {}
    for path in sorted(each for each in out.rglob("*") if each.is_file()):
        name = path.relative_to(out).as_posix()
        if name in RUN_FILES:
            continue
        found[name] = path.read_bytes()
        if path.name == "segmentation.json":
            content = json.loads(path.read_text())
            del content["seconds"], content["peak_memory_mib"]
            found[name] = content
    return found


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [each.status for each in outcomes]


# --- what is finished -----------------------------------------------------------------------------


def test_the_same_is_skipped_and_says_what_it_was(
    network: ThresholdNetwork, tmp_path: Path
) -> None:
    write_scan(tmp_path / "data" / "a.nii.gz")
    (first,) = segment(network, tmp_path / "data", tmp_path / "out")
    assert first.ct_sha256 and len(first.ct_sha256) == 64
    sidecar = Sidecar.read(Path(first.files[-1]))
    assert sidecar.ct_sha256 == first.ct_sha256
    assert sidecar.model_sha256 == weights_sha256(network)  # type: ignore[arg-type]
    assert sidecar.peak_memory_mib and 50 < sidecar.peak_memory_mib < 100_000
    (again,) = segment(network, tmp_path / "data", tmp_path / "out", existing="skip")
    assert again.status == "skipped"
    same = ("files", "volumes_ml", "truncated", "warnings", "ct_sha256")
    assert [getattr(again, name) for name in same] == [getattr(first, name) for name in same]


def other_ct(network: ThresholdNetwork, ct: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    before = ct.stat()
    write_scan(ct, seed=1)
    content = ct.read_bytes()[: before.st_size].ljust(before.st_size, b"\0")
    ct.write_bytes(content)  # of the same size and date: neither can tell
    os.utime(ct, ns=(before.st_atime_ns, before.st_mtime_ns))
    return {}


def other_weights(network: ThresholdNetwork, ct: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    network.levels += 0.01
    return {}


def other_settings(
    network: ThresholdNetwork, ct: Path, patch: pytest.MonkeyPatch
) -> dict[str, Any]:
    wider = replace(network.config.preprocessing, hu_windows=((-1000.0, 900.0),))
    network.config = replace(network.config, preprocessing=wider)
    return {}


def other_version(network: ThresholdNetwork, ct: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    sidecar = ct.parents[1] / "out" / "a" / "segmentation.json"
    text = sidecar.read_text().replace(f'"{foundation.__version__}"', '"0.0.1"')
    sidecar.write_text(text)
    return {}


Change = Callable[[ThresholdNetwork, Path, pytest.MonkeyPatch], dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_ct, "from a CT with another content"),
        (other_weights, "with other weights"),
        (other_settings, "with other settings of the model"),
        (other_version, "by version 0.0.1"),
        (lambda *_: {"classes": ["liver"]}, "with other classes (4, not the 1 asked for)"),
        (lambda *_: {"overlap": 0.25}, "with overlap 0.5 instead of 0.25"),
        (lambda *_: {"postprocess": False}, "with postprocess True instead of False"),
        (lambda *_: {"layout": "both"}, "with layout 'multilabel' instead of 'both'"),
        (lambda *_: {"preview": True}, "with preview False instead of True"),
    ],
)
def test_what_was_made_otherwise_is_reported_and_not_skipped(
    change: Change,
    said: str,
    network: ThresholdNetwork,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ct = write_scan(tmp_path / "data" / "a.nii.gz")
    segment(network, ct, tmp_path / "out")
    options = change(network, ct, monkeypatch)
    before = results(tmp_path / "out")
    (found,) = segment(network, ct, tmp_path / "out", existing="skip", **options)
    assert found.status == "failed" and found.error
    assert f"was made {said}" in found.error and "--overwrite" in found.error
    assert results(tmp_path / "out") == before
    if change is not other_ct:  # which is broken now
        (found,) = segment(network, ct, tmp_path / "out", existing="overwrite", **options)
        assert found.status == "done"
        (found,) = segment(network, ct, tmp_path / "out", existing="skip", **options)
        assert found.status == "skipped"


@pytest.mark.parametrize("name", ["out", "seg.nii.gz"])
def test_a_result_without_a_sidecar_or_with_half_a_one_is_not_finished(
    name: str, network: ThresholdNetwork, tmp_path: Path
) -> None:
    ct, out = write_scan(tmp_path / "data" / "a.nii.gz"), tmp_path / name
    (found,) = segment(network, ct, out)
    sidecar = Path(found.files[-1])
    sidecar.write_text(sidecar.read_text().replace('"complete": true', '"complete": false'))
    (found,) = segment(network, ct, out, existing="skip")
    assert found.status == "done"
    sidecar.unlink()
    with pytest.raises(UsageError, match="is not universal-ct's"):
        segment(network, ct, out, existing="skip")


def test_a_ct_that_changes_while_it_is_read_is_told(
    network: ThresholdNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ct = write_scan(tmp_path / "a.nii.gz")
    sha256 = folder.file_sha256

    def meanwhile(path: Path) -> str:
        digest = sha256(path)
        write_scan(path, seed=1)
        os.utime(path, ns=(1, 1))
        return digest

    monkeypatch.setattr(folder, "file_sha256", meanwhile)
    (found,) = segment(network, ct, tmp_path / "out")
    assert found.error and "was changed while it was read" in found.error


def test_weights_are_known_by_their_values() -> None:
    one, two = torch.nn.Conv3d(1, 2, 3), torch.nn.Conv3d(1, 2, 3)
    assert weights_sha256(one) != weights_sha256(two)  # type: ignore[arg-type]
    two.load_state_dict(one.state_dict())
    assert weights_sha256(one) == weights_sha256(two)  # type: ignore[arg-type]
    assert weights_sha256(one) != weights_sha256(two.half())  # type: ignore[arg-type]


# --- several processes, parts, deaths -------------------------------------------------------------


def test_masks_are_the_same_alone_in_a_batch_in_parts_and_resumed(
    network: ThresholdNetwork, tmp_path: Path
) -> None:
    bad = write_scans(tmp_path / "data", 4, 2)
    whole = segment(network, tmp_path / "data", tmp_path / "whole")
    assert [each.case for each in whole if each.status == "failed"] == bad
    assert exit_code(whole) == 3
    expected = results(tmp_path / "whole")
    assert len(expected) >= 4 * 3
    for ct in sorted((tmp_path / "data").iterdir()):
        segment(network, ct, tmp_path / "alone")
    for number in (2, 3, 1):
        segment(network, tmp_path / "data", tmp_path / "parts", part=f"{number}/3")
    for name in (4, 6):  # as if killed after some
        inputs = sorted((tmp_path / "data").iterdir())[:name]
        segment(network, inputs, tmp_path / "resumed", existing="skip")  # type: ignore[arg-type]
    for name in ("alone", "parts", "resumed"):
        assert results(tmp_path / name) == expected
        assert {each.name for each in (tmp_path / name).iterdir()} == {
            each.name for each in (tmp_path / "whole").iterdir()
        }


def test_parts_are_all_cases_once(tmp_path: Path) -> None:
    cases = find_cases([tmp_path / f"{name}.nii.gz" for name in "abcdefg"], tmp_path / "out")
    for count in range(1, 9):
        parts = [part_of(cases, f"{number}/{count}") for number in range(1, count + 1)]
        assert sorted((case for part in parts for case in part), key=cases.index) == cases
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_case_of_another_process_is_no_failure(network: ThresholdNetwork, tmp_path: Path) -> None:
    write_scans(tmp_path / "data", 3, 0)
    cases = find_cases([tmp_path / "data"], tmp_path / "out")
    with claimed(cases[0].files.claim):
        found = segment(network, tmp_path / "data", tmp_path / "out")
    assert statuses(found) == ["claimed", "done", "done"] and exit_code(found) == 0
    # It dies; by the time that the others are done, its case is free.
    claim = claimed(cases[0].files.claim)
    claim.__enter__()
    found = []
    for outcome in segment_cases(network, cases, Running(existing="skip"), progress=False):  # type: ignore[arg-type]
        found.append(outcome)
        if len(found) == 2:
            claim.__exit__(None, None, None)
    assert [each.case for each in found] == ["case01", "case02", "case00"]
    assert statuses(found) == ["skipped", "skipped", "done"]


@pytest.mark.parametrize("existing", ["refuse", "skip", "overwrite"])
def test_what_another_process_has_made_meanwhile_is_not_made_again(
    existing: str, network: ThresholdNetwork, tmp_path: Path
) -> None:
    write_scans(tmp_path / "data", 2, 0)
    if existing != "refuse":
        segment(network, tmp_path / "data", tmp_path / "out")
    cases = find_cases([tmp_path / "data"], tmp_path / "out")
    run = segment_cases(network, cases, Running(existing=existing), progress=False)  # type: ignore[arg-type]
    found = [next(run)]
    segment(
        network, [cases[1].ct], tmp_path / "out", existing="overwrite"  # type: ignore[arg-type]
    )  # fmt: skip
    found += run
    assert statuses(found) == ["skipped" if existing == "skip" else "done", "skipped"]


def die(case: Any, out: Path, times: int) -> None:
    """As if the process had died in a case, in the midst of writing."""
    for _ in range(times):
        Manifest(out / "universal-ct.jsonl").started(case)
        left = case.files.root.parent / f"{case.files.claim.stem}-abc"
        left.mkdir(exist_ok=True)
        (left / "segmentation.nii.gz").write_bytes(b"half")
        case.files.claim.write_bytes(b"")


def test_a_case_in_which_the_process_died_twice_is_set_aside(
    network: ThresholdNetwork, tmp_path: Path
) -> None:
    write_scans(tmp_path / "data", 3, 0)
    out = tmp_path / "out"
    cases = find_cases([tmp_path / "data"], out)
    segment(network, cases[1].ct, out)
    die(cases[0], out, 1)
    order: list[str] = []
    found = segment(
        network,
        tmp_path / "data",
        out,
        existing="skip",
        report=lambda each: order.append(each.case),
    )
    assert order == ["case01", "case02", "case00"], "after what can be done without a doubt"
    assert statuses(found) == ["done", "skipped", "done"]
    assert [each.case for each in found] == ["case00", "case01", "case02"]
    assert {path.name for path in out.iterdir()} == {*RUN_FILES, *order}, "what it left is gone"
    die(cases[2], out, 2)
    for _ in range(2):  # it stays so
        found = segment(network, tmp_path / "data", out, existing="overwrite")
        assert statuses(found) == ["done", "done", "failed"]
        assert found[2].error and "set aside: the process died 2 times" in found[2].error
    found = segment(network, tmp_path / "data", out, existing="overwrite", retry=True)
    assert statuses(found) == ["done"] * 3
    found = segment(network, tmp_path / "data", out, existing="skip")
    assert statuses(found) == ["skipped"] * 3
    assert {path.name for path in out.iterdir()} == {*RUN_FILES, *order}


def test_a_wrong_request_leaves_no_trace(network: ThresholdNetwork, tmp_path: Path) -> None:
    write_scans(tmp_path / "data", 2, 0)
    for wrong in ({"classes": "aorta"}, {"overlap": 2.0}, {"layout": "dicom"}, {"part": "3/2"}):
        with pytest.raises(UsageError):
            segment(network, tmp_path / "data", tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


# --- SIGKILL --------------------------------------------------------------------------------------


def start(data: Path, out: Path, **options: Any) -> subprocess.Popen[str]:
    tests = REPOSITORY / "tests"
    paths = os.pathsep.join([str(tests), str(REPOSITORY)])
    process = subprocess.Popen(
        [sys.executable, tests / "batches.py", data, out, json.dumps(options)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, dict[str, str]]:
    said, errors = process.communicate(timeout=120)
    assert process.returncode in (0, 3), errors
    return process.returncode, json.loads(said)


@pytest.mark.slow
def test_a_batch_that_is_killed_ten_times_is_as_an_unbroken_one(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    bad = write_scans(data, 34, 6)
    begun = time.monotonic()
    code, unbroken = finish(start(data, tmp_path / "unbroken"))
    whole_s = time.monotonic() - begun
    assert code == 3 and [name for name, what in unbroken.items() if what == "failed"] == bad
    rng = np.random.default_rng(0)
    for _ in range(10):
        pair = [start(data, out, existing="skip") for _ in range(2)]
        time.sleep(rng.uniform(0.05, 0.3) * whole_s / 2)
        first, second = rng.permutation(2)
        pair[first].send_signal(signal.SIGKILL)
        time.sleep(rng.uniform(0, 0.05))
        pair[second].send_signal(signal.SIGKILL)
        for process in pair:
            process.communicate()
    killed = sum(process_died(out).values())
    # Chance may have killed one case twice: then it is taken up again when it is asked for.
    pair = [start(data, out, existing="skip", retry=True) for _ in range(2)]
    ends = [finish(process) for process in pair]
    assert {code for code, _ in ends} == {3}
    code, last = finish(start(data, out, existing="skip"))
    assert code == 3
    assert last == {name: "failed" if name in bad else "skipped" for name in last}
    assert len(last) == 40
    assert killed >= 3, "cases were in work when the processes died"
    expected = results(tmp_path / "unbroken")
    assert results(out) == expected
    assert {path.name for path in out.iterdir()} == {*RUN_FILES, *(set(last) - set(bad))}


def process_died(out: Path) -> dict[str, int]:
    """How many times each case was started and not finished."""
    count: dict[str, int] = {}
    for line in (out / "universal-ct.jsonl").read_text().splitlines():
        event = json.loads(line)
        step = {"started": 1, "finished": -1}.get(event["event"], 0)
        if step > 0 or (step < 0 and event["status"] == "done"):
            count[event["case"]] = count.get(event["case"], 0) + step
    return count
