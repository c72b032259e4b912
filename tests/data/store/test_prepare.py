"""`prepare` over datasets: resumable, broken scans named and skipped, the same result each time."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from foundation.cli import prepare as command
from foundation.data.store import prepare as running
from foundation.data.store.arrays import Store
from foundation.data.store.manifest import differences, read_expected
from foundation.data.store.prepare import Report, prepare
from foundation.data.store.processes import in_processes
from foundation.errors import UniversalCTError, UsageError
from foundation.synthesis import phantom

DESCRIPTION = """
name: mine
licence: CC0-1.0
layout: nifti
images: "images/{id}.nii.gz"
labels: "labels/{id}.nii.gz"
classes:
  1: liver
  2: [kidney_right, kidney_left]
  3: {name: vertebra L1, prompt: A CT of a vertebra L1}
"""


@cache
def body_of(seed: int) -> phantom.Phantom:
    return phantom.generate(seed, 8.0)


class Data:
    """A folder with phantoms as a dataset of the user's own."""

    def __init__(self, root: Path, cases: int = 3) -> None:
        self.root = root / "data"
        self.yaml = root / "mine.yaml"
        self.yaml.write_text(DESCRIPTION)
        for seed in range(cases):
            self.add(f"case{seed}", seed)

    def add(self, id_: str, seed: int) -> None:
        body = body_of(seed)
        labels = np.zeros(body.label_map.shape, np.uint8)
        for name, value in (("liver", 1), ("kidney_left", 2), ("kidney_right", 2), ("spleen", 3)):
            labels[body.mask(name)] = value
        hu = np.where(body.label_map > 0, 40, -1000).astype(np.int16)
        for folder, array in (("images", hu), ("labels", labels)):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, body.affine), self.root / folder / f"{id_}.nii.gz")

    def prepare(self, store: Path, **more: Any) -> Report:
        more = {"spacing_mm": 8.0, "workers": 1, "progress": False, **more}
        return prepare([(str(self.yaml), self.root)], store, **more)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store but its lock, the manifest without the time it was created."""
    found = {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
    manifest = json.loads(found["manifest.json"])
    del manifest["created"], manifest["sha256"]
    return {**found, "manifest.json": json.dumps(manifest).encode()}


KEYS = ("mine/case0", "mine/case1", "mine/case2")


# --- a whole run ----------------------------------------------------------------------------------


def test_no_bar_is_drawn_into_a_file(data: Data, tmp_path: Path, capfd: Any) -> None:
    data.prepare(tmp_path / "store", progress=True)
    assert "%|" not in capfd.readouterr().err


def test_a_dataset_becomes_a_store(data: Data, tmp_path: Path) -> None:
    report = data.prepare(tmp_path / "store")
    assert report.prepared == KEYS
    assert not report.failed
    store = Store(tmp_path / "store")
    assert tuple(store.keys()) == KEYS
    body = phantom.generate(1, 8.0)
    case = store.case("mine/case1")
    labels = case.read_labels()
    classes = ["liver", "kidney_right", "kidney_left"]
    membership = case.membership(classes)
    for column, name in enumerate(classes):
        np.testing.assert_array_equal(membership[labels, column], body.mask(name))
    np.testing.assert_allclose(case.affine, body.affine, atol=1e-5)
    entry = store.manifest["cases"]["mine/case1"]
    assert entry["annotated"] == ["kidney_right", "kidney_left", "liver", "vertebra L1"]
    assert entry["voxels"]["liver"] == body.mask("liver").sum()
    assert entry["licence"] == "CC0-1.0"
    assert [source["path"] for source in entry["sources"]] == [
        "images/case1.nii.gz",
        "labels/case1.nii.gz",
    ]
    assert store.manifest["spacing_mm"] == 8.0
    assert store.manifest["prompts"] == {"vertebra L1": "A CT of a vertebra L1"}
    assert "vertebra L1" in store.manifest["classes"]


def test_the_same_data_give_the_same_store(data: Data, tmp_path: Path) -> None:
    data.prepare(tmp_path / "one")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(data.root, elsewhere)
    time.sleep(1.1)  # another second, another `created`
    prepare([(str(data.yaml), elsewhere)], tmp_path / "two", spacing_mm=8.0, workers=1)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    text = (tmp_path / "one" / "manifest.json").read_text()
    assert str(tmp_path) not in text


@pytest.mark.slow
def test_processes_give_the_same_store(data: Data, tmp_path: Path) -> None:
    (data.root / "images" / "case1.nii.gz").write_bytes(b"junk")
    one = data.prepare(tmp_path / "one")
    two = data.prepare(tmp_path / "two", workers=2)
    assert (one.prepared, one.failed) == (two.prepared, two.failed)
    assert list(two.failed) == ["mine/case1"]
    assert content(tmp_path / "one") == content(tmp_path / "two")


# --- resuming -------------------------------------------------------------------------------------


def test_what_is_unchanged_is_left_alone(data: Data, tmp_path: Path) -> None:
    store = tmp_path / "store"
    data.prepare(store)
    before = content(store)
    times = {path: path.stat().st_mtime_ns for path in (store / "cases").rglob("*")}
    assert data.prepare(store).skipped == KEYS
    assert {path: path.stat().st_mtime_ns for path in (store / "cases").rglob("*")} == times
    assert content(store) == before
    assert data.prepare(store, overwrite=True).prepared == KEYS
    assert content(store) == before


def test_what_has_changed_is_prepared_again(data: Data, tmp_path: Path) -> None:
    store = tmp_path / "store"
    data.prepare(store)
    data.add("case1", 7)
    report = data.prepare(store)
    assert (report.prepared, report.skipped) == (("mine/case1",), ("mine/case0", "mine/case2"))
    np.testing.assert_array_equal(
        Store(store).case("mine/case1").read_labels() == 1, phantom.generate(7, 8.0).mask("liver")
    )
    data.yaml.write_text(DESCRIPTION.replace("1: liver", "1: spleen"))
    assert data.prepare(store).prepared == KEYS
    assert "spleen" in Store(store).case("mine/case0").annotated
    data.add("case3", 4)
    shutil.rmtree(store / "cases" / "mine" / "case2")
    (store / "cases" / "mine" / "case0" / "ct.b2nd").unlink()
    assert data.prepare(store).prepared == ("mine/case0", "mine/case2", "mine/case3")


def test_a_case_that_is_gone_leaves_the_manifest(data: Data, tmp_path: Path, capsys: Any) -> None:
    data.prepare(tmp_path / "store")
    for folder in ("images", "labels"):
        (data.root / folder / "case1.nii.gz").unlink()
    data.prepare(tmp_path / "store")
    assert Store(tmp_path / "store").keys() == ["mine/case0", "mine/case2"]
    assert "dropped from the manifest: mine/case1" in capsys.readouterr().err


def test_an_interrupted_run_is_completed(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.prepare(tmp_path / "unbroken")
    store, written = tmp_path / "store", []

    def stop_at_the_second(folder: Path, *arguments: Any) -> Any:
        written.append(folder)
        if len(written) == 2:
            (folder / "ct.b2nd").write_bytes(b"half")
            raise KeyboardInterrupt
        return write_case(folder, *arguments)

    write_case = running.write_case
    with monkeypatch.context() as patch:
        patch.setattr(running, "write_case", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            data.prepare(store)
    assert Store(store).keys() == ["mine/case0"]
    report = data.prepare(store)
    assert (report.skipped, report.prepared) == (KEYS[:1], KEYS[1:])
    assert content(store) == content(tmp_path / "unbroken")


KILLED = """
import os, pathlib, sys
from foundation.data.store import prepare as running
written, write_case = [], running.write_case

def write(folder, *arguments):
    description = write_case(folder, *arguments)
    written.append(folder)
    if sys.argv[4] == "writing" and len(written) == 2:
        (folder / "case.json").unlink()
        os.kill(os.getpid(), 9)
    return description

def replace(source, target, replace=pathlib.Path.replace):
    replace(source, target)
    if sys.argv[4] == "replacing" and target.name.endswith(".old"):
        os.kill(os.getpid(), 9)

running.write_case, pathlib.Path.replace = write, replace
running.prepare([(sys.argv[1], sys.argv[2])], sys.argv[3], spacing_mm=8.0, workers=1)
"""


@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_a_killed_run_is_completed(data: Data, tmp_path: Path, moment: str) -> None:
    data.prepare(tmp_path / "unbroken")
    store = tmp_path / "store"
    if moment == "replacing":  # a finished case whose source has changed
        data.add("case0", 9)
        data.prepare(store)
        data.add("case0", 0)
    command_line = [sys.executable, "-c", KILLED, str(data.yaml), str(data.root), str(store)]
    killed = subprocess.run([*command_line, moment], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [path.name for path in (store / "cases" / "mine").iterdir() if path.name[0] == "."]
    assert left, "the kill must leave something half done"
    for key in Store(store).keys():  # noqa: SIM118 - a store is no dictionary
        case = store / "cases" / key
        assert not case.exists() or (case / "case.json").is_file(), "whole or not at all"
    report = data.prepare(store)
    assert not report.failed
    assert content(store) == content(tmp_path / "unbroken")


def test_two_runs_do_not_write_one_store(data: Data, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    data.prepare(tmp_path / "store")
    with (tmp_path / "store" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="Another"):
            data.prepare(tmp_path / "store")
    data.prepare(tmp_path / "store")


# --- broken scans ---------------------------------------------------------------------------------


def test_a_broken_scan_is_named_and_skipped(data: Data, tmp_path: Path, capsys: Any) -> None:
    store, image = tmp_path / "store", data.root / "images" / "case1.nii.gz"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    report = data.prepare(store)
    assert report.prepared == ("mine/case0", "mine/case2")
    assert "damaged or cut short" in report.failed["mine/case1"]
    assert "mine/case1 failed and was skipped: images/case1.nii.gz" in capsys.readouterr().err
    manifest = Store(store).manifest
    assert sorted(manifest["cases"]) == ["mine/case0", "mine/case2"]
    assert manifest["failed"] == report.failed
    assert str(tmp_path) not in json.dumps(manifest)
    assert not (store / "cases" / "mine" / "case1").exists()

    image.write_bytes(whole)
    assert data.prepare(store).prepared == ("mine/case1",)
    assert not Store(store).manifest["failed"]

    image.write_bytes(b"")  # what was fine and now is broken is no longer offered
    assert list(data.prepare(store).failed) == ["mine/case1"]
    assert "mine/case1" not in Store(store).keys()  # noqa: SIM118


def test_an_image_without_labels_is_listed_as_failed(data: Data, tmp_path: Path) -> None:
    (data.root / "labels" / "case2.nii.gz").unlink()
    report = data.prepare(tmp_path / "store")
    assert report.prepared == KEYS[:2]
    assert list(report.failed) == ["mine/case2"]
    assert "mine/case2" in Store(tmp_path / "store").manifest["failed"]


def test_a_fault_of_ours_does_not_cost_the_other_scans(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("unforeseen")

    with monkeypatch.context() as patch:
        patch.setattr(running, "write_case", fail)
        report = data.prepare(tmp_path / "store")
    assert report.failed == dict.fromkeys(KEYS, "ZeroDivisionError: unforeseen")
    assert not list((tmp_path / "store" / "cases").rglob("*.b2nd"))


def _square(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


@pytest.mark.slow
def test_a_process_that_dies_costs_one_case() -> None:
    results = dict(in_processes(_square, [0, 1, 2, 3, 4], 2))
    assert results == {0: 0, 1: 1, 2: None, 3: 9, 4: 16}


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(data: Data, tmp_path: Path) -> None:
    """Each process that is spawned runs the script anew, which would start processes again."""
    call = f"prepare([({str(data.yaml)!r}, {str(data.root)!r})], 'store', workers=2, spacing_mm=8)"
    script = tmp_path / "script.py"
    script.write_text(f"from foundation.data.store.prepare import prepare\n{call}\n")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert 'Put what the script does under `if __name__ == "__main__":`' in last
    assert "This is a worker process that is starting" in done.stderr
    assert "out of memory" not in done.stderr
    assert Store(tmp_path / "store").keys() == [], "nothing is prepared"
    guarded = script.read_text().replace("prepare([", 'if __name__ == "__main__":\n    prepare([')
    script.write_text(guarded)
    subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, check=True)
    assert Store(tmp_path / "store").keys() == list(KEYS)


# --- manifests ------------------------------------------------------------------------------------


def test_data_that_differ_from_a_manifest_are_refused(data: Data, tmp_path: Path) -> None:
    data.prepare(tmp_path / "store")
    expected = tmp_path / "store" / "manifest.json"
    assert differences(read_expected(expected), {"mine": data.root}) == []
    assert differences(read_expected(expected), {"mine": data.root, "other": tmp_path}) == []
    assert data.prepare(tmp_path / "same", manifest=expected).prepared == KEYS

    path = data.root / "labels" / "case1.nii.gz"
    changed = bytearray(path.read_bytes())
    changed[-20] ^= 1
    path.write_bytes(bytes(changed))
    (data.root / "images" / "case0.nii.gz").write_bytes(b"short")
    (data.root / "images" / "case2.nii.gz").unlink()
    assert differences(read_expected(expected), {"mine": data.root}) == [
        "mine/case0: images/case0.nii.gz has another size",
        "mine/case1: labels/case1.nii.gz has another SHA-256",
        "mine/case2: images/case2.nii.gz is missing",
    ]
    data.add("case9", 1)
    with pytest.raises(UniversalCTError, match="nothing was prepared") as caught:
        data.prepare(tmp_path / "other", manifest=expected)
    for text in ("case0.nii.gz has", "case1.nii.gz has", "case2: not found", "case9: not in"):
        assert text in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_a_manifest_of_another_spacing_or_dataset_is_refused(data: Data, tmp_path: Path) -> None:
    data.prepare(tmp_path / "store")
    with pytest.raises(UsageError, match="--spacing"):
        data.prepare(tmp_path / "other", manifest=tmp_path / "store", spacing_mm=6.0)
    data.yaml.write_text(DESCRIPTION.replace("name: mine", "name: yours"))
    with pytest.raises(UniversalCTError, match="no dataset yours"):
        data.prepare(tmp_path / "other", manifest=tmp_path / "store")
    with pytest.raises(UsageError, match="not a readable manifest"):
        read_expected(data.yaml)


# --- usage ----------------------------------------------------------------------------------------


def test_a_store_has_one_spacing(data: Data, tmp_path: Path) -> None:
    data.prepare(tmp_path / "store")
    with pytest.raises(UsageError, match=r"at 8\.0 mm, not 6\.0 mm"):
        data.prepare(tmp_path / "store", spacing_mm=6.0)
    assert Store(tmp_path / "store").manifest["spacing_mm"] == 8.0


def test_datasets_are_added_to_a_store(data: Data, tmp_path: Path) -> None:
    store = tmp_path / "store"
    data.prepare(store)
    data.yaml.write_text(DESCRIPTION.replace("name: mine", "name: yours"))
    data.prepare(store)
    keys = Store(store).keys()
    assert len(keys) == 6
    assert keys[:3] == list(KEYS)


@pytest.mark.parametrize("options", [{"spacing_mm": 0.0}, {"spacing_mm": 99.0}, {"workers": 0}])
def test_settings_out_of_range(data: Data, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        data.prepare(tmp_path / "store", **options)


def test_the_same_case_twice(data: Data, tmp_path: Path) -> None:
    pair = (str(data.yaml), data.root)
    with pytest.raises(UsageError, match="Found twice: mine/case0"):
        prepare([pair, pair], tmp_path / "store", spacing_mm=8.0, workers=1)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser.add_subparsers(dest="verb"))
    return parser.parse_args(["prepare", *arguments])


def test_the_command_line(data: Data, tmp_path: Path, capsys: Any) -> None:
    store = str(tmp_path / "store")
    given = (f"{data.yaml}={data.root}", "-o", store, "--spacing", "8", "--workers", "1", "-q")
    assert command.run(parse(*given, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"store": store, "prepared": list(KEYS), "skipped": [], "failed": {}}
    (data.root / "images" / "case1.nii.gz").write_bytes(b"junk")
    assert command.run(parse(*given, "--json")) == 1
    assert list(json.loads(capsys.readouterr().out)["failed"]) == ["mine/case1"]
    with pytest.raises(UsageError, match="DATASET=DIR"):
        command.run(parse(str(data.yaml), "-o", store))
    with pytest.raises(UsageError, match="nothing"):
        command.run(parse(f"nothing={data.root}", "-o", store))


def test_the_command_loads_nothing_heavy() -> None:
    script = (
        "import sys, foundation.cli.prepare\n"
        "print(sorted({'torch', 'numpy', 'blosc2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
