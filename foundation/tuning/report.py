"""What a tuning reached and what it made the model forget: one HTML file, and a CSV beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from foundation.files import replacing
from foundation.legend import display_name
from foundation.preparation.store import StoredCase
from foundation.tuning.changes import FORGOTTEN, Change, change, write_table
from foundation.tuning.charts import Curve, case_png, changes_svg, curves_svg
from foundation.tuning.evaluation import Interval, Metric, Scores, read_masks

PAGE, TABLE = "report.html", "report.csv"


@dataclass(frozen=True)
class Report:
    """What a report is made of.

    lineage: what → value, e.g. "base model", its SHA-256, data, method. new, old: names of classes.
    before, after: scores on the same scans. measured_on: what these are, in words.
    training: validation Dice by step; fewshot: Dice by number of training scans.
    cases: that were measured; masks: the folder in which `evaluate` kept masks of new classes.
    notes: what a reader should know, e.g. which neighbours in text a new class has.
    """

    title: str
    lineage: Mapping[str, str]
    new: tuple[str, ...]
    old: tuple[str, ...]
    before: Scores
    after: Scores
    measured_on: str = "test scans"
    training: tuple[Curve, ...] = ()
    fewshot: tuple[Curve, ...] = ()
    cases: tuple[StoredCase, ...] = ()
    masks: Path | None = None
    notes: tuple[str, ...] = field(default=())

    def change(self, title: str, classes: Sequence[str], metric: Metric = "dice") -> Change:
        """As `changes.change`, of these scores."""
        return change(self.before, self.after, title, classes, metric)

    def changes(self, classes: Sequence[str]) -> list[Change]:
        """The change of the Dice of each class."""
        return [self.change(name, [name]) for name in classes]

    def groups(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Classes, new and old, that some scan shows."""
        measured = {*self.before.classes, *self.after.classes}
        new, old = (tuple(n for n in names if n in measured) for names in (self.new, self.old))
        return new, old


def write_report(folder: str | Path, report: Report) -> Path:
    """Write report.html and report.csv into a folder; returns the path of the page."""
    folder = Path(folder)
    with replacing(folder / TABLE) as temporary:
        write_table(temporary, report.before, report.after, *report.groups())
    with replacing(folder / PAGE) as temporary:
        temporary.write_text(page(report), encoding="utf-8")
    return folder / PAGE


# --- page -----------------------------------------------------------------------------------------

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1b1f24;max-width:960px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.3rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .6rem;text-align:right;border-bottom:1px solid #e3e7eb;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:#57606a;font-weight:600;font-size:.86rem}
td small{color:#57606a}tr.mean td{font-weight:600;border-top:2px solid #8b949e}
tr.forgot td{background:#fdecea}.up{color:#1a7f37}.down{color:#c62828}
.cards{display:flex;gap:1rem;flex-wrap:wrap;margin:1.2rem 0}
.card{flex:1 1 280px;border:1px solid #d5dae0;border-left:6px solid #1f6feb;border-radius:6px;
padding:.7rem 1rem}.card.good{border-left-color:#1a7f37}.card.bad{border-left-color:#c62828;
background:#fdecea}.card b{display:block;font-size:1.35rem}.card span{color:#57606a}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem}dt{color:#57606a}
dd{margin:0;overflow-wrap:anywhere}figure{margin:.6rem 0 1.4rem}img,svg{max-width:100%;height:auto}
figcaption{color:#57606a;font-size:.9rem}.note{color:#57606a}
"""


def page(report: Report) -> str:
    """The report as one HTML page without any link to the outside."""
    new, old = report.groups()
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="note">{_measured(report)}</p>',
        f'<div class="cards">{_card_of_new(report, new)}{_card_of_old(report, old)}</div>',
        "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes),
        _section("New classes", _class_table(report, new, "new")),
        _pictures(report, new),
        _section("Old classes: what was forgotten", _class_table(report, old, "old")),
    ]
    if report.training:
        text = "Mean Dice of the new classes in the validation scans; the best step is kept."
        chart = curves_svg(report.training, "step", "validation Dice")
        parts.append(_section("Training", f"<p>{text}</p>{chart}"))
    if report.fewshot:
        text = "Mean Dice of the new classes by the number of training scans."
        chart = curves_svg(report.fewshot, "training scans", "Dice", counts=True)
        parts.append(_section("How many scans it takes", f"<p>{text}</p>{chart}"))
    entries = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in report.lineage.items()
    )
    parts.append(_section("Lineage", f"<dl>{entries}</dl>"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _measured(report: Report) -> str:
    scores = report.after
    text = (
        f"Measured on {len(scores.cases)} {escape(report.measured_on)}, at "
        f"{scores.spacing_mm:g} mm. NSD: surface Dice with a tolerance of "
        f"{scores.tolerance_mm:g} mm. "
    )
    if scores.tolerance_mm < scores.spacing_mm:
        text += "The tolerance is below the voxel size: only the very same border voxels count. "
    if len(scores.cases) < 3:
        return text + "Fewer than three scans: no intervals, since they would be made up."
    return text + "In brackets: 95 % intervals by bootstrap over scans."


def _card_of_new(report: Report, new: Sequence[str]) -> str:
    if not new:
        text = "<b>New classes: not measured</b><span>no scan shows them</span>"
        return f'<div class="card">{text}</div>'
    mean = report.change("", new)
    return (
        f'<div class="card"><span>New classes ({len(new)}), mean Dice</span>'
        f"<b>{_number(mean.before)} → {_number(mean.after)} {_interval(mean.interval)}</b>"
        f"<span>before: by the prompt alone; after: tuned</span></div>"
    )


def _card_of_old(report: Report, old: Sequence[str]) -> str:
    if not old:
        return (
            '<div class="card"><b>Forgetting: not measured</b><span>no old class is labelled in '
            "these scans; give test scans that label some</span></div>"
        )
    mean = report.change("", old)
    worst = min(report.changes(old), key=lambda each: each.change or 0.0)
    marked = [each for each in report.changes(old) if each.forgotten]
    lost = f"; {len(marked)} of {len(old)} fell by more than {FORGOTTEN:g}" if marked else ""
    return (
        f'<div class="card {"bad" if mean.forgotten else "good"}">'
        f"<span>Old classes ({len(old)}), mean Dice: "
        f"{'the model forgot' if mean.forgotten else 'nothing forgotten on average'}</span>"
        f"<b>{_number(mean.before)} → {_number(mean.after)} ({_signed(mean.change)})</b>"
        f"<span>worst: {escape(display_name(worst.name))} {_signed(worst.change)}{lost}"
        f"</span></div>"
    )


def _class_table(report: Report, classes: Sequence[str], group: str) -> str:
    if not classes:
        return "<p>None of them is labelled and present in these scans.</p>"
    rows = [(display_name(name), [name], "") for name in classes]
    if len(classes) > 1:
        rows.append((f"Mean of {len(classes)}", list(classes), "mean"))
    body, lines = "", {}
    for title, names, kind in rows:
        dice, nsd = (report.change(title, names, metric) for metric in ("dice", "nsd"))
        kinds = f"{kind} forgot" if group == "old" and dice.forgotten else kind
        body += f'<tr class="{kinds}"><td>{escape(title)}</td><td>{dice.scans}</td>'
        body += "".join(_cells(each) for each in (dice, nsd)) + "</tr>"
        if not kind and dice.before is not None and dice.after is not None:
            lines[names[0]] = (dice.before, dice.after)
    heads = "".join(f"<th>{m} before</th><th>after</th><th>change</th>" for m in ("Dice", "NSD"))
    bad = [each.name for each in report.changes(classes) if each.forgotten]
    table = f"<table><tr><th>Class</th><th>Scans</th>{heads}</tr>{body}</table>"
    marked = "<p class='note'>Marked: Dice fell by more than 0.01.</p>" if group == "old" else ""
    return table + marked + f"<figure>{changes_svg(lines, bad)}</figure>"


def _cells(found: Change) -> str:
    direction = "" if not found.change else "up" if found.change > 0 else "down"
    return (
        f"<td>{_number(found.before)}</td>"
        f"<td>{_number(found.after)} <small>{_interval(found.interval)}</small></td>"
        f'<td class="{direction}">{_signed(found.change)}</td>'
    )


def _pictures(report: Report, new: Sequence[str]) -> str:
    """Best, median and worst scan by the mean Dice of the new classes; fewer of few scans."""
    if report.masks is None:
        return ""
    by_case = report.after.by_case(new)
    order = sorted(by_case, key=lambda key: -by_case[key])
    if not order:
        return ""
    places = {0: "Best", len(order) - 1: "Worst", len(order) // 2: "Median"}
    if len(order) < 3:
        places = {0: "Best", len(order) - 1: "Worst"} if len(order) == 2 else {0: "The only scan"}
    cases = {case.key: case for case in report.cases}
    figures = ""
    for place in sorted(places):
        case = cases.get(order[place])
        masks = read_masks(report.masks, case) if case else {}
        names = [name for name in new if case and name in case.annotated and name in masks]
        if case is None or not names:
            continue
        labels, membership = case.read_labels(), case.membership(names)
        references = {name: membership[:, i][labels] for i, name in enumerate(names)}
        caption = f"{places[place]}: {case.key}, mean Dice {by_case[case.key]:.3f}"
        picture = case_png(case, masks, references)
        figures += (
            f'<figure><img alt="{escape(caption)}" src="{picture}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return _section("Best, median and worst scan", figures) if figures else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def _interval(interval: Interval) -> str:
    return "" if interval is None else f"({interval[0]:.3f} to {interval[1]:.3f})"
