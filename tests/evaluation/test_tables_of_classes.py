"""A table with a row for each class and a column for each arm."""

from pathlib import Path

import pytest

from foundation import UsageError
from foundation.evaluation import Figure, Table, append_record, new_record, render_table


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for text, seed, liver, aorta in (("one-hot", 1, 0.5, 0.25), ("MiniLM", 1, 0.75, None)):
        figures = [Figure("dice/mean", 0.1), Figure("dice/liver", liver)]
        figures += [Figure("dice/aorta", aorta)]
        record = new_record("x", "mini", arm={"text": text}, seed=seed, figures=figures, seconds=1)
        append_record(tmp_path / "x.jsonl", record)
    return tmp_path


def test_each_arm_has_a_column_and_each_class_a_row(root: Path) -> None:
    columns = {"class": "", "one-hot": "one-hot", "ours": "MiniLM"}
    table = Table("classes", columns, ("x.jsonl",), across="arm.text", cell="{dice/*:2}")
    assert render_table(table, root).splitlines()[2:] == [
        "| mean | 0.10 | 0.10 |",
        "| liver | 0.50 | 0.75 |",
        "| aorta | 0.25 | – |",
    ]
    table = Table(
        "classes", columns, ("x.jsonl",), across="arm.text", cell="{dice/*:2}", skip=("mean",)
    )
    assert "mean" not in render_table(table, root)


def test_a_template_is_needed(root: Path) -> None:
    with pytest.raises(UsageError, match="needs a template such as"):
        render_table(Table("classes", {"class": ""}, ("x.jsonl",), across="arm.text"), root)
