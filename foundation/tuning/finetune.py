"""`finetune`: new classes by prompt and a few scans, with what it made the model forget.

    finetune("universal-ct", "scans/", ["vertebra L1"], output="runs/l1", method="head")

OUTPUT receives model/ or adapter/, report.html, report.csv, the splits, and the state from which
an interrupted tuning goes on.
"""

from __future__ import annotations

import copy
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from foundation.adapting.adapters import base_sha256
from foundation.adapting.classes import Neighbour, add_classes, nearest_classes, zero_shot_note
from foundation.config import ClassSpec
from foundation.data.naming import NewClass
from foundation.evaluation.agreement import agreement, card_section, summary
from foundation.evaluation.charts import Curve
from foundation.evaluation.report import Report, write_report
from foundation.evaluation.scores import Scores, evaluate
from foundation.hardware import keep_freed_memory
from foundation.hub.adapter_files import add_adapter, save_adapter
from foundation.hub.cards import Card, generate_card
from foundation.hub.load import from_pretrained
from foundation.hub.saved import save_pretrained
from foundation.inference.predict import choose_device
from foundation.model import UniversalModel
from foundation.text import class_prompt
from foundation.tuning.data import Split, TuningData, read_data
from foundation.tuning.methods import Method, Protection, get_method
from foundation.tuning.setup import build_tuner, probe
from foundation.tuning.tuner import VALIDATION, Tuner

MODEL, ADAPTER, TUNING, DATA, MASKS = "model", "adapter", "tuning", "data", "masks"
BEFORE, AFTER = "before", "after"  # within the masks


@dataclass(frozen=True)
class Tuned:
    """What a tuning gave.

    model: with the new classes, in evaluation mode. saved: folder of the model, or of the adapter.
    before, after: scores of new and old classes on the same scans. agreement: of old classes with
    the model before, in scans that do not label them; no accuracy. neighbours: new class → the
    known ones nearest in text. best_step: which the validation chose. report: an HTML file.
    """

    model: UniversalModel
    saved: Path
    new: tuple[str, ...]
    old: tuple[str, ...]
    before: Scores
    after: Scores
    agreement: Scores
    neighbours: dict[str, tuple[Neighbour, ...]]
    best_step: int
    report: Path

    def summary(self) -> dict[str, Any]:
        """All of it but the model, as plain data."""
        return {
            "saved": str(self.saved),
            "report": str(self.report),
            "best_step": self.best_step,
            "new": list(self.new),
            "old": list(self.old),
            "nearest": {
                name: [asdict(each) for each in found] for name, found in self.neighbours.items()
            },
            "dice": {
                name: {"before": self.before.mean([name]), "after": self.after.mean([name])}
                for name in (*self.new, *self.old)
                if name in self.after.classes
            },
            "agreement": summary(self.agreement),
        }

    def table(self) -> str:
        """Dice of each new class and the mean over old ones, before and after, as text.

        Of old classes in scans that do not label them: how far they agree with the model before.
        """
        rows = [(name, [name]) for name in self.new if name in self.after.classes]
        measured = [name for name in self.old if name in self.after.classes]
        if measured:
            rows.append((f"mean of {len(measured)} old classes", measured))
        lines = [
            f"{title:<32} Dice {self.before.mean(names) or 0:.3f} → "
            f"{self.after.mean(names) or 0:.3f}"
            for title, names in rows
        ]
        if kept := self.agreement.classes:
            title = f"{len(kept)} old classes, not labelled"
            mean = self.agreement.mean(kept)
            lines.append(f"{title:<32} Dice agreement with the model before {mean:.3f}")
        return "\n".join(lines)


def finetune(
    model: str | Path | UniversalModel,
    data: str | Path,
    classes: Sequence[NewClass | str],
    *,
    output: str | Path,
    method: str = "head",
    test: str | Path | None = None,
    validation: float = 0.2,
    seed: int = 1,
    device: str | torch.device = "auto",
    protect: Protection | None = None,
    tolerance_mm: float = 2.0,
    name: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Tuned:
    """Add classes to a model by prompt, tune it on a few scans, and report what that changed.

    model: a name, a folder, org/name on the Hub, or a model; it is not changed. data, classes: see
    `tuning.data.read_data`; a class may be given by its name alone. output: folder of the run; the
    same call goes on where an interrupted one stopped. method, settings: see `tuning.methods`.
    test: scans that are only measured, in the layouts of `data`; else the validation scans are.
    validation: share of the scans that stop the training. protect: see `Method.protects`.
    tolerance_mm: of the surface Dice. name: of the new model.

    Raises:
        UsageError: see `read_data`, `get_method` and `add_classes`; or `output` holds another run.
        HubError, WeightsError: the model cannot be loaded. MissingExtraError: an extra is missing.
    """
    chosen = get_method(method, protects=protect, **settings)
    base = model if isinstance(model, UniversalModel) else from_pretrained(model)
    wanted = [given if isinstance(given, NewClass) else NewClass(given) for given in classes]
    run = Path(output)
    found = read_data(
        data,
        classes=wanted,
        work=run / DATA,
        spacing_mm=base.config.preprocessing.spacing_mm[0],
        test=test,
        split=Split(validation, seed),
        old_classes=base.classes,
        workers=1,  # others would start the caller's script anew where it has no main guard
        progress=progress,
    )
    place = choose_device(device)
    if place.type == "cpu":
        keep_freed_memory()  # as `pretrain` does: half of a step's time
    tuned = with_classes(base, wanted, chosen, seed).to(place)
    neighbours = {spec.name: nearest_classes(base, spec.prompt) for spec in specs_of(base, wanted)}
    notes = [zero_shot_note(new, near) for new, near in neighbours.items()]
    if progress:
        tqdm.write("\n".join(notes), file=sys.stderr)  # before hours of training, not after
    measured = found.test or found.validation
    compared = (*found.names, *base.classes)
    options: dict[str, Any] = {"tolerance_mm": tolerance_mm, "progress": progress}
    masks = run / MASKS
    before = evaluate(tuned, measured, compared, masks=masks / BEFORE, keep=base.classes, **options)
    if chosen.trains == "adapter":
        add_adapter(tuned, name or found.names[0].replace(" ", "-"), rank=chosen.rank, seed=seed)
    run_of: dict[str, Any] = {"seed": seed, "device": place, "progress": progress}
    if chosen.probe:
        shared = {key: getattr(chosen, key) for key in ("voxels", "windows", "balance")}
        probe(tuned, base, found, chosen.probe, run / TUNING, **shared, **run_of)
    tuner = build_tuner(tuned, base, found, chosen, run / TUNING, **run_of)
    tuner.train()
    tuned.eval()
    after = evaluate(tuned, measured, compared, masks=masks / AFTER, keep=compared, **options)
    agreed = agreement(masks / BEFORE, masks / AFTER, measured, base.classes, tolerance_mm)
    tuned.config = replace(tuned.config, name=name or run.name)
    saved = save(tuned, base, found, chosen, tuner, after, agreed, run)
    report = write_report(
        run,
        Report(
            title=f"{', '.join(found.names)}: {chosen.name}",
            lineage=lineage(base, found, chosen, seed),
            new=found.names,
            old=base.classes,
            before=before,
            after=after,
            agreement=agreed,
            measured_on="test scans" if found.test else "validation scans",
            training=(Curve("validation Dice", validation_curve(run / TUNING)),),
            cases=measured,
            masks=masks / AFTER,
            notes=(*found.notes, *notes),
        ),
    )
    return Tuned(
        *(tuned, saved, found.names, base.classes, before, after, agreed, neighbours),
        best_step=tuner.best_step,
        report=report,
    )


def specs_of(base: UniversalModel, wanted: Sequence[NewClass]) -> list[ClassSpec]:
    """What the model is told of each new class: its name, its sentence and its parent."""
    text = base.config.text
    return [
        ClassSpec(each.name, each.prompt or class_prompt(each.name, text), each.parent)
        for each in wanted
    ]


def with_classes(
    base: UniversalModel, wanted: Sequence[NewClass], method: Method, seed: int
) -> UniversalModel:
    """A copy of the model that knows the new classes by their prompts, untrained."""
    grown = copy.deepcopy(base)
    specs = specs_of(base, wanted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_classes(grown, specs, kind=method.branch, width=method.width)
    return grown


def save(
    tuned: UniversalModel,
    base: UniversalModel,
    data: TuningData,
    method: Method,
    tuner: Tuner,
    scores: Scores,
    agreed: Scores,
    run: Path,
) -> Path:
    """Write the model, or the adapter alone, with a card that tells where it comes from."""
    if method.trains == "adapter":
        return save_adapter(tuned, run / ADAPTER)
    count = sum(parameter.numel() for parameter in tuned.parameters())
    plain = generate_card(tuned.config, count, {})
    rows = [
        f"| {name} | {scores.mean([name]):.3f} | {scores.mean([name], 'nsd'):.3f} |"
        for name in (*data.names, *base.classes)
        if name in scores.classes
    ]
    facts = [
        "## Lineage",
        "",
        *(f"- {key}: {value}" for key, value in lineage(base, data, method, None).items()),
        f"- best step: {tuner.best_step} of {tuner.step}",
        "",
        "## Results",
        "",
        f"On {len(scores.cases)} {'test' if data.test else 'validation'} scans, at "
        f"{scores.spacing_mm:g} mm; surface Dice with a tolerance of {scores.tolerance_mm:g} mm.",
        "",
        "| class | Dice | surface Dice |",
        "|-|-|-|",
        *rows,
        *card_section(agreed),
    ]
    text = plain.text.partition("## SHA-256")[0] + "\n".join(facts) + "\n"
    card = Card(tuned.config.name, plain.metadata, text)
    return save_pretrained(tuned, run / MODEL, card=card, dtype=torch.float16)


def lineage(
    base: UniversalModel, data: TuningData, method: Method, seed: int | None
) -> dict[str, str]:
    """Where a tuned model comes from: base, data, method."""
    facts = {
        "base model": base.config.name,
        "SHA-256 of its weights, in half precision": base_sha256(base),
        "data": f"{data.layout}, SHA-256 {data.digest}",
        "scans": f"{len(data.train)} to train, {len(data.validation)} to validate, "
        f"{len(data.test)} to test",
        "method": ", ".join(f"{key} {value}" for key, value in asdict(method).items()),
    }
    return facts if seed is None else {**facts, "seed": str(seed)}


def validation_curve(folder: Path) -> tuple[tuple[float, float], ...]:
    """Step and mean Dice of each validation of a tuning."""
    with (folder / VALIDATION).open(newline="", encoding="utf-8") as file:
        return tuple((float(row["step"]), float(row["mean"])) for row in csv.DictReader(file))
