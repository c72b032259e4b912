"""Tunings side by side: means are of the numbers given, and a fall is marked."""

import csv
from pathlib import Path

from foundation.evaluation.comparison import write_comparison


def summary(new: float, liver: float, spleen: float) -> dict[str, object]:
    dice = {
        "hip": {"before": 0.0, "after": new},
        "rib": {"before": None, "after": None},
        "liver": {"before": 0.9, "after": liver},
        "spleen": {"before": 0.8, "after": spleen},
    }
    return {"new": ["hip", "rib"], "old": ["liver", "spleen", "colon"], "dice": dice}


def test_runs_are_compared_class_by_class(tmp_path: Path) -> None:
    runs = {"kept": summary(0.5, 0.9, 0.79), "<careless>": summary(0.6, 0.9, 0.7)}
    page = write_comparison(tmp_path, runs, ["one scan"]).read_text()
    with (tmp_path / "comparison.csv").open(newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert rows["mean of 2 old classes"]["kept before"] == "0.8500"
    assert rows["mean of 2 old classes"]["kept after"] == "0.8450"
    assert rows["mean of 2 old classes"]["<careless> after"] == "0.8000"
    assert rows["mean of 2 new classes"]["kept after"] == "0.5000", "what was not measured is out"
    assert rows["Rib"]["kept after"] == ""
    assert "colon" not in page and "one scan" in page and "&lt;careless&gt;" in page
    marked = [line.split("</td>")[0] for line in page.split('<tr class="forgot"><td>')[1:]]
    assert marked == ["&lt;careless&gt;"], "only what fell by more than 0.01"
