"""What a tuning reached and what it made the model forget: one HTML file, and a CSV beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from foundation.data.store.arrays import StoredCase
from foundation.evaluation.agreement import CHANGED, NOT_COMPARED, changed
from foundation.evaluation.changes import FORGOTTEN, METRICS, Change, change, with_mean, write_table
from foundation.evaluation.charts import Curve, case_png, changes_svg, curves_svg
from foundation.evaluation.html import document, number, section, signed
from foundation.evaluation.intervals import Interval
from foundation.evaluation.metrics import tolerance_of, tolerance_text
from foundation.evaluation.scores import Metric, Scores
from foundation.evaluation.scoring import read_masks
from foundation.files import replacing
from foundation.imaging.legend import display_name

PAGE, TABLE = "report.html", "report.csv"
_AGREEMENT = "Old classes that the scans do not label: agreement with the model before"


@dataclass(frozen=True)
class Report:
    """What a report is made of.

    Attributes:
        title: Heading of the page.
        lineage: What → value, e.g. "base model", its SHA-256, data, method.
        new: Names of the classes that were added.
        old: Names of the classes that the model had before; none for a network without any.
        before: Scores before.
        after: Scores after, on the same scans.
        agreement: Of old classes with the model before, in scans that do not label them.
        measured_on: What the scans are, in words.
        before_is: What was measured before, in words.
        training: Validation Dice by step.
        fewshot: Dice by number of training scans.
        cases: The scans that were measured.
        masks: The folder in which `evaluate` kept masks of new classes.
        notes: What a reader should know, e.g. which neighbours in text a new class has.
    """

    title: str
    lineage: Mapping[str, str]
    new: tuple[str, ...]
    old: tuple[str, ...]
    before: Scores
    after: Scores
    agreement: Scores = NOT_COMPARED
    measured_on: str = "test scans"
    before_is: str = "by the prompt alone"
    training: tuple[Curve, ...] = ()
    fewshot: tuple[Curve, ...] = ()
    cases: tuple[StoredCase, ...] = ()
    masks: Path | None = None
    notes: tuple[str, ...] = field(default=())

    def change(self, title: str, classes: Sequence[str], metric: Metric = "dice") -> Change:
        """Compute the change of the mean over classes; see `evaluation.changes.change`."""
        return change(self.before, self.after, title, classes, metric)

    def changes(self, classes: Sequence[str]) -> list[Change]:
        """Compute the change of the Dice of each class."""
        return [self.change(name, [name]) for name in classes]

    def groups(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the classes that a scan shows: the new ones, and the old ones."""
        measured = {*self.before.classes, *self.after.classes}
        new, old = (tuple(n for n in names if n in measured) for names in (self.new, self.old))
        return new, old


def write_report(folder: str | Path, report: Report) -> Path:
    """Write report.html and report.csv into a folder.

    Args:
        folder: Missing folders are made.
        report: What they are made of.

    Returns:
        The path of the page.
    """
    folder = Path(folder)
    with replacing(folder / TABLE) as temporary:
        write_table(temporary, report.before, report.after, *report.groups(), report.agreement)
    with replacing(folder / PAGE) as temporary:
        temporary.write_text(page(report), encoding="utf-8")
    return folder / PAGE


# --- page -----------------------------------------------------------------------------------------


def page(report: Report) -> str:
    """Write the report as one HTML page without any link to the outside."""
    new, old = report.groups()
    lineage = "".join(
        f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in report.lineage.items()
    )
    parts = [
        f'<p class="note">{_measured(report)}</p>',
        f'<div class="cards">{_card_of_new(report, new)}{_card_of_old(report, old)}</div>',
        "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes),
        section("New classes", _class_table(report, new, "new")),
        _pictures(report, new),
    ]
    if report.old:
        parts.append(section("Old classes: what was forgotten", _class_table(report, old, "old")))
    if report.agreement.rows:
        parts.append(section(_AGREEMENT, _agreement_table(report.agreement)))
    if report.training:
        text = "Mean Dice of the new classes in the validation scans; the best step is kept."
        chart = curves_svg(report.training, "step", "validation Dice")
        parts.append(section("Training", f"<p>{text}</p>{chart}"))
    if report.fewshot:
        text = "Mean Dice of the new classes by the number of training scans."
        chart = curves_svg(report.fewshot, "training scans", "Dice", counts=True)
        parts.append(section("How many scans it takes", f"<p>{text}</p>{chart}"))
    parts.append(section("Lineage", f"<dl>{lineage}</dl>"))
    return document(report.title, parts)


def _measured(report: Report) -> str:
    scores = report.after
    text = f"Measured on {len(scores.cases)} {escape(report.measured_on)}, {_grid(scores)}. "
    tolerance_mm, least = scores.tolerance_mm, 0.0
    if tolerance_mm is not None:
        text += f"NSD: surface Dice with a tolerance of {tolerance_text(tolerance_mm)}. "
        least = min((tolerance_of(tolerance_mm, name) for name in scores.classes), default=0.0)
    if scores.spacing_mm and 0 < least < scores.spacing_mm:
        text += "The tolerance is below the voxel size: "
        text += "a border that is one voxel off counts as wrong. "
    if len(scores.cases) < 3:
        return text + "Fewer than three scans: no intervals, since they would be made up."
    return text + "In brackets: 95 % intervals by bootstrap over scans."


def _grid(scores: Scores) -> str:
    if scores.spacing_mm is None:
        return "on the grid of each scan"
    return f"at {scores.spacing_mm:g} mm"


def _card_of_new(report: Report, new: Sequence[str]) -> str:
    if not new:
        text = "<b>New classes: not measured</b><span>no scan shows them</span>"
        return f'<div class="card">{text}</div>'
    mean = report.change("", new)
    return (
        f'<div class="card"><span>New classes ({len(new)}), mean Dice</span>'
        f"<b>{number(mean.before)} → {number(mean.after)} {_interval(mean.interval)}</b>"
        f"<span>before: {escape(report.before_is)}; after: tuned</span></div>"
    )


def _card_of_old(report: Report, old: Sequence[str]) -> str:
    if not report.old:
        return ""
    if not old and report.agreement.rows:
        return _card_of_agreement(report.agreement)
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
        f"<b>{number(mean.before)} → {number(mean.after)} ({signed(mean.change)})</b>"
        f"<span>worst: {escape(display_name(worst.name))} {signed(worst.change)}{lost}"
        f"</span></div>"
    )


def _card_of_agreement(scores: Scores) -> str:
    names, marked = scores.classes, changed(scores)
    worst = min(names, key=lambda name: scores.mean([name]) or 0.0)
    return (
        f'<div class="card {"bad" if marked else "good"}">'
        f"<span>Old classes ({len(names)}), none labelled: agreement with the model before, mean "
        f"Dice</span><b>{number(scores.mean(names))} {_interval(scores.interval(names))}</b>"
        f"<span>not accuracy; least: {escape(display_name(worst))} "
        f"{number(scores.mean([worst]))}; {len(marked)} of {len(names)} below {CHANGED:g}"
        f"</span></div>"
    )


def _agreement_table(scores: Scores) -> str:
    names, marked = scores.classes, changed(scores)
    body = ""
    for title, group in with_mean(names, f"Mean of {len(names)}", display_name, least=2):
        kind = "mean" if len(group) > 1 else "forgot" if group[0] in marked else ""
        body += f'<tr class="{kind}"><td>{escape(title)}</td><td>{len(scores.by_case(group))}</td>'
        for metric in METRICS:
            interval = _interval(scores.interval(group, metric))
            body += f"<td>{number(scores.mean(group, metric))} <small>{interval}</small></td>"
        body += "</tr>"
    heads = "<th>Class</th><th>Scans</th><th>Dice agreement</th><th>NSD agreement</th>"
    return (
        "<p>The tuned model's masks compared with those of the model before: 1 says that nothing "
        "changed. This is agreement, not accuracy: no reference says which of the two is right. "
        "Scans in which neither model sees a class are left out; where it was not seen before and "
        f"is now, that is a 0.</p><table><tr>{heads}</tr>{body}</table><p class='note'>Marked: "
        f"Dice agreement below {CHANGED:g}; {len(marked)} of {len(names)} classes.</p>"
    )


def _class_table(report: Report, classes: Sequence[str], group: str) -> str:
    if not classes:
        return "<p>None of them is labelled and present in these scans.</p>"
    body, lines = "", {}
    for title, names in with_mean(classes, f"Mean of {len(classes)}", display_name, least=2):
        kind = "mean" if len(names) > 1 else ""
        dice, nsd = (report.change(title, names, metric) for metric in METRICS)
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
    change = signed(found.change)
    direction = {"+": "up", "−": "down"}.get(change[0], "")
    return (
        f"<td>{number(found.before)}</td>"
        f"<td>{number(found.after)} <small>{_interval(found.interval)}</small></td>"
        f'<td class="{direction}">{change}</td>'
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
        masks = read_masks(report.masks, case, new) if case else {}
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
    return section("Best, median and worst scan", figures) if figures else ""


def _interval(interval: Interval) -> str:
    return "" if interval is None else f"({interval[0]:.3f} to {interval[1]:.3f})"
