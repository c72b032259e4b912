"""`finetune`: classes by prompt and a few scans, with what it made the model forget.

    finetune("universal-ct", "scans/", ["vertebra L1"], output="runs/l1", method="head")

OUTPUT receives model/ or adapter/, report.html, report.csv, the splits, and the state from which
an interrupted tuning goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from foundation.adapting.classes import Neighbour
from foundation.data.naming import NewClass
from foundation.evaluation.agreement import summary
from foundation.evaluation.scores import Scores
from foundation.hub.load import from_pretrained
from foundation.model import UniversalModel
from foundation.tuning.methods import get_method
from foundation.tuning.run import AFTER, BEFORE, TuningRun


@dataclass(frozen=True)
class Tuned:
    """What a tuning gave.

    Args:
        model: With the new classes, in evaluation mode.
        saved: Folder of the model, or of the adapter.
        new: Names of the classes that were learnt.
        old: Names of the model's other classes.
        before: Scores of both before the training.
        after: Scores on the same scans after it.
        agreement: Of old classes with the model before, in scans that do not label them; this is
            no accuracy.
        neighbours: New class → the known ones nearest in text.
        best_step: Which the validation chose.
        report: An HTML file.
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
        """Return all of it but the model, as plain data."""
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
        """Return Dice of each class to learn and the mean over old ones, before and after, as text.

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
    tolerance_mm: float = 2.0,
    name: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Tuned:
    """Teach a model classes by prompt and a few scans, and report what that changed.

    Started by `torchrun` or `accelerate launch`, several processes share the work.

    Args:
        model: A name, a folder, org/name on the Hub, or a model; it is not changed.
        data: Labelled scans, see `read_data`.
        classes: To learn, each by its name or as a `NewClass`. A class that the model has is tuned
            further, with its name, channel and colour; any other one is added.
        output: Folder of the run; the same call goes on where an interrupted one stopped.
        method: A name of `METHODS`: head, lora, full or continual.
        test: Scans that are only measured, in the layouts of `data`; else the validation scans are.
        validation: Share of the scans by which the best step is chosen.
        seed: Of splits and training.
        device: auto, cpu, cuda, cuda:1 or mps.
        tolerance_mm: Of the surface Dice.
        name: Of the new model or adapter.
        progress: Show how far it is.
        settings: Of the method, see its class; None keeps the method's own value.

    Returns:
        The tuned model, its folder, scores and report.

    Raises:
        UsageError: See `TuningRun.read` and `get_method`; or `output` holds another run.
        HubError: The model cannot be found.
        WeightsError: The model is damaged.
        MissingExtraError: An extra is not installed.
    """
    chosen = get_method(method, **settings)
    base = model if isinstance(model, UniversalModel) else from_pretrained(model)
    run = TuningRun(base, chosen, Path(output), seed, device, tolerance_mm, name, progress)
    run.read(data, classes, test=test, validation=validation)
    before = run.measure(BEFORE)
    trained = run.train()
    after = run.measure(AFTER)
    return Tuned(
        model=run.model,
        saved=run.save(before, after),
        new=run.learnt,
        old=run.old,
        before=before,
        after=after,
        agreement=run.agreement(),
        neighbours={each.name: each.neighbours for each in run.expected},
        best_step=trained.best_step,
        report=run.report(before, after),
    )
