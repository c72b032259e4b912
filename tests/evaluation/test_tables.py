"""Tables: each kind shows what the records hold, and a template cannot name what is not there."""

import dataclasses

import pytest

from foundation.errors import UsageError
from foundation.evaluation import (
    Figure,
    PaperRow,
    PaperTable,
    Record,
    Table,
    new_record,
    render_blocks,
    render_records,
)


def record(arm: dict[str, str | int | float], *figures: Figure, seed: int | None = None) -> Record:
    made = new_record("b", "mini", arm=arm, figures=figures, seconds=1, seed=seed, command="run me")
    return dataclasses.replace(made, date="2026-01-02")


def body(table: Table, records: list[Record], theirs: PaperTable | None = None) -> list[list[str]]:
    lines = render_records(table, records, theirs).splitlines()
    rows = [
        [cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("| ")
    ]
    return rows[1:]


def test_seeds_are_averaged_and_one_run_has_its_interval() -> None:
    records = [
        *(record({"text": "V1"}, Figure("dice/mean", v), seed=s) for s, v in enumerate((0.5, 0.7))),
        record({"text": "V3"}, Figure("dice/mean", 0.6, low=0.55, high=0.65)),
        record({"text": "none"}, Figure("dice/mean", None)),
    ]
    table = Table("arms", {"prompt": "{arm.text}", "Dice": "{dice/mean:2}", "run": "`{command}`"})
    assert body(table, records) == [
        ["V1", "0.60 ± 0.14 (2 seeds)", "`run me`"],
        ["V3", "0.60 [0.55, 0.65]", "`run me`"],
        ["none", "–", "`run me`"],
    ]
    assert [row[0] for row in body(dataclasses.replace(table, kind="runs"), records)].count(
        "V1"
    ) == 2
    chosen = dataclasses.replace(table, where={"arm.text": "V3"})
    assert [row[0] for row in body(chosen, records)] == ["V3"]


def test_numbers_are_written_as_asked() -> None:
    one = record({}, Figure("a", 0.906), Figure("b", -0.0021), Figure("c", 0.0), Figure("d", 0.5))
    cells = {"1": "{a:%}", "2": "{a:%0}", "3": "{b:+3}", "4": "{c:+3}", "5": "{d:+1}", "6": "{d}"}
    assert body(Table("arms", cells), [one]) == [["90.6 %", "91 %", "−0.002", "0", "+0.5", "0.5"]]
    with pytest.raises(UsageError, match="cannot be written as 'x'"):
        body(Table("arms", {"1": "{a:x}"}), [one])


def test_classes_pivot_and_written_rows() -> None:
    one = record({}, Figure("dice/liver", 0.9), Figure("dice/spleen", None), Figure("dice/mean", 1))
    by_class = Table("classes", {"class": "{*}", "Dice": "{dice/*:1}"}, skip=("mean",), none="none")
    assert body(by_class, [one]) == [["liver", "0.9"], ["spleen", "none"]]
    grid = [
        record({"scans": n, "start": s}, Figure("dice/mean", v))
        for n, s, v in ((1, "weights", 0.4), (1, "scratch", 0.2), (2, "weights", 0.5))
    ]
    columns = {"scans": "", "pretrained": "weights", "scratch": "scratch"}
    pivot = Table("pivot", columns, down="arm.scans", across="arm.start", cell="{dice/mean:1}")
    assert body(pivot, grid) == [["1", "0.4", "0.2"], ["2", "0.5", ""]]


def test_the_papers_numbers_stand_before_ours() -> None:
    theirs = PaperTable(
        "t",
        "%",
        (
            PaperRow({"text": "V3"}, {"dice/mean": 86.13}, "2"),
            PaperRow({"text": "V1"}, {"dice/mean": None}, "U"),
        ),
    )
    columns = {"prompt": "{arm.text}", "Dice": "{dice/mean:1}", "source": "{source}"}
    table = Table("paper", columns, paper="t")
    assert body(table, [record({"text": "V1"}, Figure("dice/mean", 0.5))], theirs) == [
        ["V3", "86.1", "paper (2: second-hand)"],
        ["V1", "unknown", "paper (U: unknown)"],
        ["V1", "50.0", "measured here (mini)"],
    ]
    assert len(body(table, [], theirs)) == 2, "before anything was run"


def test_only_the_last_of_a_data_set_counts() -> None:
    two = [record({"dataset": "a", "model": m}, Figure("d", v)) for m, v in (("x", 1), ("y", 2))]
    table = Table("arms", {"model": "{arm.model}", "d": "{d}"}, latest="arm.dataset")
    assert body(table, two) == [["y", "2"]]


def test_what_no_record_has_is_an_error_and_no_empty_cell() -> None:
    one = record({"text": "V1"}, Figure("dice/mean", 0.5))
    with pytest.raises(UsageError, match="Did you mean 'dice/mean'"):
        body(Table("arms", {"x": "{dice/maen}"}), [one])
    with pytest.raises(UsageError, match="No record"):
        body(Table("arms", {"x": "{dice/mean}"}, where={"size": "real"}), [one])
    other = record({"text": "V3"}, Figure("dice/mean", 0.6))
    with pytest.raises(UsageError, match="several values"):
        body(Table("arms", {"x": "{arm.text}"}, before="{dice/mean}"), [one, other])


def test_blocks_are_filled_and_nothing_else_is_touched() -> None:
    block = "<!-- records: t -->\nold\n<!-- end records -->\n"
    text = f"# A\n\nSee `<!-- records: NAME -->`.\n\n{block}B\n"
    filled = render_blocks(text, lambda name: f"new {name}\n")
    assert filled == text.replace("old", "new t")
    assert render_blocks(filled, lambda name: f"new {name}") == filled


@pytest.mark.parametrize(
    "lines",
    [
        ["<!-- records: t -->"],
        ["<!-- end records -->"],
        ["<!-- records: t -->", "<!-- records: u -->", "<!-- end records -->"],
        ["<!-- records: t -->", "<!-- end records -->", "<!-- end records -->"],
    ],
)
def test_a_block_has_a_beginning_and_an_end(lines: list[str]) -> None:
    with pytest.raises(UsageError, match=r"f\.md"):
        render_blocks("\n".join(lines), str.upper, "f.md")


def test_a_star_means_any_value() -> None:
    asked = dataclasses.replace(record({"verdict": "Which?"}), note="Neither.")
    table = Table("runs", {"answer": "{note}"}, where={"arm.verdict": "*"})
    assert body(table, [asked, record({"start": "scratch"})]) == [["Neither."]]
    with pytest.raises(UsageError, match="No record"):
        render_records(table, [record({"start": "scratch"})])
