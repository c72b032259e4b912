"""Records: whole lines, read strictly, with all that is needed to run them again."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from foundation.errors import UsageError
from foundation.evaluation import (
    Figure,
    Record,
    append_record,
    command_line,
    describe_machine,
    git_commit,
    new_record,
    paper,
    path_sha256,
    read_records,
)

HASH = "ab" * 32


def record(seed: int = 0, **changes: object) -> Record:
    made = new_record(
        "table1_prompts",
        "mini",
        arm={"text": "one-hot", "scans": 5, "rate": 0.5},
        seed=seed,
        figures=[Figure("dice/mean", 0.61, low=0.5, high=0.7, n=12), Figure("dice/liver", None)],
        seconds=1.5,
        data={"world": HASH},
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "records" / "a.jsonl"
    for seed in (0, 1):
        append_record(path, record(seed))
    assert read_records(path) == [record(0), record(1)]
    assert len(path.read_text().splitlines()) == 2
    assert read_records(path)[1].figure("dice/mean").value == 0.61


def test_a_run_says_where_and_with_what() -> None:
    made = record()
    assert made.machine == describe_machine() and "CPU" in made.machine
    assert {"python", "torch", "monai", "universal-ct"} <= set(made.versions)
    assert made.commit == git_commit() and len(made.commit.rstrip("+")) in (0, 40)


@pytest.mark.parametrize("torn", ['{"format_version": 1, "bench', "{", '{"a": 1'])
def test_a_line_that_a_kill_tore_is_no_record_and_does_no_harm(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "a.jsonl"
    append_record(path, record(0))
    with path.open("a") as file:
        file.write(torn)
    assert read_records(path) == [record(0)]
    append_record(path, record(1))
    assert read_records(path) == [record(0), record(1)]


def test_a_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(record(0).to_json())
    append_record(path, record(1))
    assert read_records(path) == [record(0), record(1)]


def test_nothing_is_added_to_somebody_elses_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"mine": 1}\n{"mine": 2}\n')
    with pytest.raises(UsageError, match=r"notes\.jsonl, line 1"):
        append_record(path, record())
    assert path.read_text() == '{"mine": 1}\n{"mine": 2}\n'


@pytest.mark.slow
def test_processes_append_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    (tmp_path / "one.json").write_text(record().to_json())
    script = (
        "import sys\nfrom foundation.evaluation import append_record, read_records\n"
        "one = read_records(sys.argv[1])[0]\n"
        "for _ in range(20): append_record(sys.argv[2], one)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "one.json"), str(path)]
    running = [subprocess.Popen(command, cwd=REPOSITORY) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert read_records(path) == [record()] * 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "tiny"}, "choose from smoke, mini, real"),
        ({"seed": "1"}, "seed"),
        ({"data": {"ct": "abc"}}, "SHA-256"),
        ({"date": "yesterday"}, "2026-11-26"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"format_version": 2}, "format_version is 2"),
        ({"figures": [{"name": "a", "value": 1}, {"name": "a", "value": 2}]}, "'a' twice"),
        ({"figures": [{"name": "a", "value": 1, "low": 0}]}, "one end of an interval"),
        ({"figures": [{"name": "a", "value": 1, "low": 2, "high": 1}]}, "lower first"),
        ({"figures": [{"name": "a", "value": "1"}]}, "expected float"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "a.jsonl"
    values = json.loads(record().to_json()) | change
    path.write_text(f"{record().to_json()}\n{json.dumps(values)}\n")
    with pytest.raises(UsageError, match=r"line 2") as caught:
        read_records(path)
    assert message in str(caught.value)


def test_an_unknown_figure_is_suggested() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'dice/mean'"):
        record().figure("dice/maen")
    with pytest.raises(UsageError, match="not finite"):
        Figure("dice/mean", float("nan"))


def test_a_folder_has_the_hash_of_its_files_and_their_names(tmp_path: Path) -> None:
    for name in ("b/x", "a"):
        (tmp_path / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / name).write_text(name)
    first = path_sha256(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert path_sha256(tmp_path / "two") == first
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "c")
    renamed = path_sha256(tmp_path / "two")
    (tmp_path / "two" / "c").write_text("x")
    assert len({first, renamed, path_sha256(tmp_path / "two")}) == 3
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        path_sha256(tmp_path / "three")


def test_no_path_of_a_machine_gets_into_a_command(tmp_path: Path) -> None:
    script = str(REPOSITORY / "benchmarks" / "agreement.py")
    words = [script, str(tmp_path / "case" / "ct.nii.gz"), "-m", str(tmp_path), f"--x={tmp_path}"]
    words += ["--record", str(tmp_path / "a.jsonl"), "model.text=one-hot", "vertebra L1"]
    name = tmp_path.name
    assert command_line(words) == (
        f"python benchmarks/agreement.py case/ct.nii.gz -m {name} --x={name} model.text=one-hot "
        "'vertebra L1'"
    )


def test_the_papers_numbers_have_grades() -> None:
    file = REPOSITORY / "benchmarks" / "paper.yaml"
    table = paper("table2_msd", file)
    universal = next(row for row in table.rows if row.arm["method"] == "Universal")
    assert universal.figures["dice/liver_tumor"] == 79.35 and universal.grade == "E"
    for name in ("table1_prompts", "table4_detection", "table5_generalisation"):
        rows = paper(name, file).rows
        assert all(row.grade == "U" and set(row.figures.values()) == {None} for row in rows)
    with pytest.raises(UsageError, match="Did you mean 'table2_msd'"):
        paper("table2", file)


def test_an_unknown_number_of_the_paper_cannot_be_given_a_value(tmp_path: Path) -> None:
    text = "{source: x, tables: {a: {title: t, unit: '%', rows: [ROW]}}}"
    for row in ("{arm: {}, figures: {d: 1}, grade: U}", "{arm: {}, figures: {d: null}, grade: E}"):
        (tmp_path / "paper.yaml").write_text(text.replace("ROW", row))
        with pytest.raises(UsageError, match="grade U"):
            paper("a", tmp_path / "paper.yaml")
