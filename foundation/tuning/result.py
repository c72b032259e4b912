"""What a tuning gave: the model, its scores before and after, and where its files lie."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foundation.adapting.classes import Neighbour
from foundation.evaluation.agreement import summary
from foundation.evaluation.scores import Scores
from foundation.model import UniversalModel


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
