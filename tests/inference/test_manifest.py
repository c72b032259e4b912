"""The manifest: what it holds, and what it survives."""

import json
from pathlib import Path

import pytest

from foundation.errors import UsageError
from foundation.files import append_text
from foundation.inference.cases import Case
from foundation.inference.manifest import Manifest, manifest_path, without_names
from foundation.inference.outcomes import Outcome
from foundation.inference.request import Request

REQUEST = Request("tiny", "0123", ("liver",), {"overlap": 0.5})


def a_case(name: str = "anna") -> Case:
    return Case(name, Path("data") / name / "ct.nii.gz", Path("out") / name)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_lies_in_the_output_folder() -> None:
    assert manifest_path("out") == Path("out/universal-ct.jsonl")
    assert manifest_path("seg.nii.gz") is None


def test_a_run_is_noted_as_it_goes(tmp_path: Path) -> None:
    path, case = tmp_path / "out" / "m.jsonl", a_case()
    manifest = Manifest(path)
    assert not path.parent.exists(), "nothing is written before there is something to note"
    manifest.begin(REQUEST, [case], "1/2")
    manifest.started(case)
    assert [each["event"] for each in lines(path)] == ["run", "started"]
    manifest.finished(
        case,
        Outcome("anna", "data/anna/ct.nii.gz", "done", warnings=["w"], seconds=1.5, ct_sha256="ab"),
    )
    run, started, finished = lines(path)
    assert run["format"] == "universal-ct manifest" and run["model_sha256"] == "0123"
    assert run["options"] == {"overlap": 0.5, "classes": ["liver"]} and run["part"] == "1/2"
    assert {"torch", "numpy", "nibabel"} <= set(run["libraries"])  # type: ignore[call-overload]
    assert started["case"] == finished["case"] == case.id
    assert {key: finished[key] for key in ("status", "warnings", "seconds", "ct_sha256")} == {
        **{"status": "done", "warnings": ["w"], "seconds": 1.5, "ct_sha256": "ab"}
    }
    log = path.with_suffix(".log").read_text().splitlines()
    assert len(log) == 3 and log[2].endswith("done in 1.5 s; warning: w")
    assert "anna" not in path.read_text() + "".join(log)


@pytest.mark.parametrize(
    ("events", "deaths"),
    [
        ("", 0),
        ("s", 1),
        ("ss", 2),
        ("sfs", 1),
        ("ssx", 0),  # a signal is no death
        ("ssa", 2),  # set aside: still
    ],
)
def test_it_knows_in_which_case_a_process_died(events: str, deaths: int, tmp_path: Path) -> None:
    case, other = a_case(), a_case("berta")
    for event in events:
        manifest = Manifest(tmp_path / "m.jsonl")
        manifest.begin(REQUEST, [case, other], None)
        manifest.started(other)
        manifest.finished(other, Outcome("berta", "", "done"))
        if event == "a":
            manifest.set_aside(case)
            continue
        if event == "s":
            manifest.started(case)
        elif event == "f":
            manifest.finished(case, Outcome("anna", "", "failed"))
        else:
            manifest.stopped(case, KeyboardInterrupt())
    now = Manifest(tmp_path / "m.jsonl")
    assert (now.deaths(case), now.deaths(other)) == (deaths, 0)


def test_a_line_that_a_kill_has_cut_costs_no_other(tmp_path: Path) -> None:
    path, case = tmp_path / "m.jsonl", a_case()
    manifest = Manifest(path)
    manifest.begin(REQUEST, [case], None)
    manifest.started(case)
    with path.open("a") as file:
        file.write('{"event": "fini')
    again = Manifest(path)
    assert again.deaths(case) == 1
    again.finished(case, Outcome("anna", "", "done"))
    assert Manifest(path).deaths(case) == 0


@pytest.mark.parametrize("content", ["{}\n", "[1]\n", "a thesis\n", '{"event": "run"}\n'])
def test_a_file_of_others_is_not_written_to(content: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match="is no manifest of universal-ct"):
        Manifest(path)
    assert path.read_text() == content
    with pytest.raises(UsageError, match="is the name of the log"):
        Manifest(tmp_path / "m.log")


def test_a_full_disk_is_told_once_and_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = Manifest(tmp_path / "m.jsonl")
    manifest.begin(REQUEST, [a_case()], None)
    before = (tmp_path / "m.jsonl").read_text()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foundation.files._write_all", full)
    for _ in range(2):
        manifest.finished(a_case(), Outcome("anna", "", "done"))
    with pytest.raises(OSError, match=r"No space left on device: .*m\.jsonl"):
        manifest.started(a_case())
    assert caplog.text.count("manifest cannot be written any more") == 1
    assert (tmp_path / "m.jsonl").read_text() == before


def test_a_part_of_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    path = tmp_path / "lines"
    append_text(path, "one\n")

    def half(file: int, content: bytes) -> None:
        os.write(file, content[:2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("foundation.files._write_all", half)
        with pytest.raises(OSError, match="lines"):
            append_text(path, "two\n")
    append_text(path, "three\n")
    assert path.read_text() == "one\nthree\n"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("data/anna/ct.nii.gz is broken", "<ct> is broken"),
        ("[Errno 28] No space left: 'out/anna/volumes.csv'", "[Errno 28] No space left: "
         "'<output>/volumes.csv'"),
        ("[Errno 13] Permission denied: 'data/anna'", "[Errno 13] Permission denied: '<folder>'"),
        ("/home/berta/x.nii and C:\\Users\\berta\\x", "<path> and <path>"),
        ("anna: annals of HU/ml", "<case>: annals of HU/ml"),
        ("intensities from -1000 to 40.", "intensities from -1000 to 40."),
    ],
)  # fmt: skip
def test_names_are_taken_out_of_messages(text: str, cleaned: str) -> None:
    assert without_names(text, a_case()) == cleaned
