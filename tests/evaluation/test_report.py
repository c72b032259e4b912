"""The report: one page without links, marks on what was forgotten, and a table."""

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import tiny_model

from foundation.data.store.arrays import Store
from foundation.evaluation.changes import change
from foundation.evaluation.charts import Curve
from foundation.evaluation.report import Report, page, write_report
from foundation.evaluation.scores import Score, Scores
from foundation.evaluation.scoring import evaluate


def scores(shift: dict[str, float], cases: int = 5) -> Scores:
    """Dice that scatter by a little in each scan, and per class by `shift`."""
    base = {"vertebra L1": 0.1, "liver": 0.9, "spleen": 0.8}
    rows = [
        Score(f"maps/{n}", name, value + shift.get(name, 0) + 0.01 * n, value)
        for n in range(cases)
        for name, value in base.items()
    ]
    return Scores(tuple(rows), 2.0, 3.0)


def agreeing(**dice: float) -> Scores:
    """Agreement of classes with the model before, alike in two scans; the NSD is half of it."""
    rows = [Score(f"maps/{n}", name, d, d / 2) for n in range(2) for name, d in dice.items()]
    return Scores(tuple(rows), 2.0, 3.0)


def report(after: Scores, cases: int = 5) -> Report:
    return Report(
        title="vertebra L1 <by> head",
        lineage={"base model": "universal-ct", "SHA-256": "0123abcd"},
        new=("vertebra L1",),
        old=("liver", "spleen", "aorta"),
        before=scores({}, cases),
        after=after,
    )


class Links(HTMLParser):
    """Collects what a page would load, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href", "data")]


@pytest.mark.slow
def test_the_page_loads_nothing_and_runs_nothing(store: Path, tmp_path: Path) -> None:
    whole = Store(store)
    cases = tuple(whole.case(f"04/case_{n}") for n in range(3))
    found = evaluate(
        tiny_model(), cases, masks=tmp_path / "masks", keep=["liver_tumor"], overlap=0.0,
        postprocess=False, progress=False,
    )  # fmt: skip
    full = Report(
        title="t",
        lineage={"data": "three scans"},
        new=("liver_tumor",),
        old=("liver",),
        before=found,
        after=found,
        training=(Curve("validation", ((0, 0.1), (50, 0.6), (100, 0.7))),),
        fewshot=(Curve("pretrained", ((1, 0.4), (5, 0.7))), Curve("scratch", ((1, 0), (5, 0.2)))),
        cases=cases,
        masks=tmp_path / "masks",
    )
    path = write_report(tmp_path / "out", full)
    links = Links()
    text = path.read_text(encoding="utf-8")
    links.feed(text)
    assert not links.open
    assert "script" not in links.tags and "link" not in links.tags
    assert [link[:5] for link in links.loaded if not link.startswith(("#", "data:image/"))] == []
    assert "url(http" not in text and "@import" not in text
    # Namespaces are names, not links; nothing else names an address.
    assert set(re.findall(r'"(https?:[^"]*)"', text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert text.count("data:image/png;base64,") == 3
    assert [word for word in ("Best", "Median", "Worst") if f">{word}: 04/case_" in text] == [
        "Best",
        "Median",
        "Worst",
    ]
    assert text.count("<svg") == 4  # new, old, training, few scans
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "report.csv",
        "report.html",
    ]


def test_what_was_forgotten_is_marked() -> None:
    fell = report(scores({"vertebra L1": 0.7, "spleen": -0.05}))
    text = page(fell)
    assert "the model forgot" in text  # −0.025 on average
    assert "worst: Spleen −0.050; 1 of 2 fell by more than 0.01" in text
    assert text.count(' forgot"') == 2  # the class and the mean
    kept = page(report(scores({"vertebra L1": 0.7, "spleen": -0.009})))
    assert "nothing forgotten on average" in kept
    assert ' forgot"' not in kept
    # A new class that gets worse is no old one forgotten.
    assert ' forgot"' not in page(report(scores({"vertebra L1": -0.05})))


def test_names_are_escaped_and_lineage_is_there() -> None:
    text = page(report(scores({})))
    assert "<by>" not in text and "vertebra L1 &lt;by&gt; head" in text
    assert "<dt>SHA-256</dt><dd>0123abcd</dd>" in text


def test_few_scans_have_no_intervals() -> None:
    many, few = page(report(scores({}))), page(report(scores({}, 2), 2))
    assert re.search(r"\(0\.9\d\d to 0\.9\d\d\)", many)
    assert not re.search(r"\(0\.\d\d\d to", few)
    assert "Fewer than three scans: no intervals" in few
    assert "a border that is one voxel off counts as wrong" in many  # 2 mm on a grid of 3 mm


def test_a_change_that_three_digits_do_not_show_has_no_sign_and_no_colour(tmp_path: Path) -> None:
    unchanged = report(scores({"liver": -0.0001, "spleen": 0.0001}))
    text = page(unchanged)
    assert "0.000</td>" in text
    assert "−0.000" not in text and "+0.000" not in text
    assert 'class="down"' not in text and 'class="up"' not in text
    write_report(tmp_path, report(scores({"liver": -0.00001})))
    assert "-0.0000" not in (tmp_path / "report.csv").read_text()


def test_a_network_without_old_classes_has_no_part_on_forgetting() -> None:
    text = page(replace(report(scores({})), old=(), before_is="an untrained head"))
    assert "Forgetting" not in text and "forgotten" not in text
    assert "before: an untrained head; after: tuned" in text


def test_forgetting_that_was_not_measured_is_said() -> None:
    text = page(replace(report(scores({})), old=("aorta",)))
    assert "Forgetting: not measured" in text
    assert "the model forgot" not in text


def test_unlabelled_old_classes_have_agreement_with_the_model_before() -> None:
    heading = "Old classes that the scans do not label: agreement with the model before"
    unlabelled = replace(report(scores({})), old=("aorta", "colon", "stomach"))
    text = page(replace(unlabelled, agreement=agreeing(aorta=1.0, colon=0.5, stomach=0.95)))
    assert "Forgetting: not measured" not in text
    assert "Old classes (3), none labelled: agreement with the model before, mean Dice" in text
    assert "not accuracy; least: Colon 0.500; 1 of 3 below 0.95" in text
    assert heading in text and "This is agreement, not accuracy" in text
    marked = re.findall(r'<tr class="forgot"><td>(\w+)</td><td>2</td><td>0.500 .*?<td>0.250 ', text)
    assert marked == ["Colon"], "at 0.95 it is not marked"
    assert text.count('forgot"') == 1
    # Where some old class is labelled, the card is of its Dice, and the table is there as well.
    both = page(replace(report(scores({})), agreement=agreeing(aorta=1.0)))
    assert "nothing forgotten on average" in both and "none labelled" not in both
    assert heading in both and heading not in page(report(scores({})))


def test_changes_are_of_pairs() -> None:
    before, after = scores({}), scores({"liver": -0.02})
    found = change(before, after, "liver", ["liver"])
    assert found.change == pytest.approx(-0.02)
    assert found.change_interval == pytest.approx((-0.02, -0.02))  # scans scatter, their change not
    assert found.interval is not None and found.interval[1] - found.interval[0] > 0.01
    assert found.forgotten
    both = change(before, after, "both", ["liver", "spleen"])
    assert both.change == pytest.approx(-0.01)
    assert not both.forgotten  # by more than 0.01, whatever rounding adds


def test_the_table_has_the_figures(tmp_path: Path) -> None:
    write_report(tmp_path, report(scores({"vertebra L1": 0.7, "spleen": -0.05})))
    with (tmp_path / "report.csv").open(encoding="utf-8") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert list(rows) == [
        *("vertebra L1", "mean of new classes", "liver", "spleen", "mean of old classes")
    ]
    assert rows["spleen"]["dice_change"] == "-0.0500"
    assert rows["spleen"]["scans"] == "5"
    assert [name for name, row in rows.items() if row["forgotten"]] == [
        "spleen",
        "mean of old classes",
    ]
    assert float(rows["vertebra L1"]["dice_low"]) < float(rows["vertebra L1"]["dice_after"])


def test_the_table_names_agreement_and_gives_it_no_dice(tmp_path: Path) -> None:
    write_report(tmp_path, replace(report(scores({})), agreement=agreeing(aorta=1.0, colon=0.5)))
    with (tmp_path / "report.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows), "no ragged line"
    unlabelled = [row for row in rows if row["group"] == "unlabelled"]
    assert [(row["class"], row["dice_agreement"], row["nsd_agreement"]) for row in unlabelled] == [
        ("aorta", "1.0000", "0.5000"),
        ("colon", "0.5000", "0.2500"),
        ("mean of unlabelled classes", "0.7500", "0.3750"),
    ]
    assert {row["scans"] for row in unlabelled} == {"2"}
    others = [row for row in rows if row["group"] != "unlabelled"]
    assert {row["dice_agreement"] for row in others} == {""}
    assert {row["dice_before"] + row["dice_after"] + row["forgotten"] for row in unlabelled} == {""}
