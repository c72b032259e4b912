"""One tuning: a model, scans and a method, from reading the scans to the report.

    run = TuningRun(from_pretrained("universal-ct"), Head(), Path("runs/l1"))
    run.read("scans", ["vertebra L1"])
    before = run.measure(BEFORE)
    run.train()
    tuned = run.finish(before, run.measure(AFTER))

`finetune` does the same in one call.
"""

from __future__ import annotations

import copy
import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from foundation.adapting.adapters import base_sha256
from foundation.adapting.classes import Expectation, add_classes, replace_classes
from foundation.config import ClassSpec
from foundation.data.naming import NewClass
from foundation.errors import UsageError, listed
from foundation.evaluation.agreement import agreement
from foundation.evaluation.charts import Curve
from foundation.evaluation.report import Report, write_report
from foundation.evaluation.scores import Scores
from foundation.evaluation.scoring import evaluate
from foundation.hardware import keep_freed_memory
from foundation.hub.new_cards import Results
from foundation.inference.predict import choose_device
from foundation.model import UniversalModel
from foundation.networks.protocol import check_trainable, require
from foundation.taxonomy import normalise
from foundation.text import class_prompt
from foundation.training.logs import draws_bars
from foundation.training.trainer import (
    LAST,
    VALIDATION,
    Precision,
    Trainer,
    accelerator_for,
)
from foundation.tuning.data import Split, TuningData, read_data
from foundation.tuning.feeds import runs_in_bfloat16
from foundation.tuning.methods.base import Method, TuningSettings
from foundation.tuning.methods.head import Head
from foundation.tuning.objective import tuning_losses
from foundation.tuning.result import Tuned
from foundation.tuning.task import TuningTask, exclusive_classes, identity

if TYPE_CHECKING:
    from accelerate import Accelerator

TUNING, DATA, MASKS, PROBE = "tuning", "data", "masks", "probe"  # folders within a run's
BEFORE, AFTER = "before", "after"  # when a run measures; folders within the masks
_T = TypeVar("_T")


@dataclass
class TuningRun:
    """A model that is tuned by a method on a few scans. All processes of a run do the same.

    Args:
        base: The model as it was; it is not changed.
        method: What is trained, and how.
        folder: Receives the model or adapter, the report, the splits and the state.
        seed: Of splits, new weights and training.
        device: Where to compute.
        tolerance_mm: Of the surface Dice.
        name: Of the new model, or of the adapter; made from folder or classes if not given.
        progress: Show how far it is, and what to expect.
    """

    base: UniversalModel
    method: Method
    folder: Path
    seed: int = 1
    device: str | torch.device = "auto"
    tolerance_mm: float = 2.0
    name: str | None = None
    progress: bool = True
    trained: Trainer = field(init=False)
    source: Path = field(init=False)
    data: TuningData = field(init=False)
    model: UniversalModel = field(init=False)
    expected: tuple[Expectation, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        require(self.base, "logits", "Tuning by prompts")
        check_trainable(self.base.config)
        self.folder = Path(self.folder)
        self.device = choose_device(self.device)
        place: torch.device = self.accelerator.device
        self.device = place
        self.shows_progress = self.progress and self.accelerator.is_main_process
        if place.type == "cpu":
            keep_freed_memory()  # half of a step's time

    @cached_property
    def accelerator(self) -> Accelerator:
        """Of all that the run trains: its device, its processes and its precision."""
        return accelerator_for(self.precision(self.method), self.device)

    @property
    def shows_bars(self) -> bool:
        """Whether others may draw progress bars."""
        return self.shows_progress and draws_bars()

    def precision(self, method: Method) -> Precision:
        """Return in what a method computes here."""
        if method.precision != "auto":
            return method.precision
        size = self.base.config.preprocessing.patch_size
        return "bfloat16" if runs_in_bfloat16(self.base, size, self.device) else "float32"

    # --- classes and scans ----------------------------------------------------------------------

    @property
    def learnt(self) -> tuple[str, ...]:
        """Names of the classes to learn, new or known."""
        return self.data.names

    @property
    def added(self) -> tuple[str, ...]:
        """Those of them that the model did not have."""
        return tuple(name for name in self.learnt if name not in self.base.classes)

    @property
    def old(self) -> tuple[str, ...]:
        """The model's other classes, which should stay as they are."""
        return tuple(name for name in self.base.classes if name not in self.learnt)

    @property
    def measured(self) -> tuple[Any, ...]:
        """The scans that are measured."""
        return self.data.test or self.data.validation

    def read(
        self,
        data: str | Path,
        classes: Sequence[NewClass | str],
        *,
        test: str | Path | None = None,
        validation: float = 0.2,
    ) -> None:
        """Read labelled scans, and give the model the new classes, untrained.

        Args:
            data: See `read_data`.
            classes: To learn. A name of the model's tunes that class further; any other name is
                added.
            test: Scans that are only measured, in the layouts of `data`.
            validation: Share of the scans by which the best step is chosen.

        Raises:
            UsageError: See `read_data` and `add_classes`; or a class cannot be learnt by this
                method.
        """
        wanted = [self._wanted(each) for each in classes]
        # Before the scans are read, which takes long: a wrong class is an error at once.
        self.model, self.expected = grown(self.base, wanted, self.method, self.seed)
        self.source = Path(data)
        with self.accelerator.main_process_first():
            self.data = read_data(
                data,
                classes=wanted,
                work=self.folder / DATA,
                spacing_mm=self.base.config.preprocessing.spacing_mm[0],
                test=test,
                split=Split(validation, self.seed),
                old_classes=self.base.classes,
                workers=1,  # others would start the caller's script anew without a main guard
                progress=self.shows_bars,
            )
        self.model.to(self.device)
        if self.shows_progress:  # before hours of training, not after
            print(*self.expected, sep="\n", file=sys.stderr)

    def _wanted(self, given: NewClass | str) -> NewClass:
        """A class to learn; a known one under its own name, with its own parent."""
        each = given if isinstance(given, NewClass) else NewClass(given)
        known = {normalise(spec.name): spec for spec in self.base.config.classes}
        if (spec := known.get(normalise(each.name))) is None:
            return each
        if each.prompt is not None and each.prompt != spec.prompt:
            raise UsageError(
                f"{spec.name!r} is a class of the model with the prompt {spec.prompt!r}, which "
                "stays. Leave the prompt out, or give a new class another name."
            )
        if each.parent is not None and each.parent != spec.parent:
            where = f"in {spec.parent!r}" if spec.parent else "without a parent"
            raise UsageError(
                f"{spec.name!r} is a class of the model {where}, which stays. Leave the parent "
                "out, or give a new class another name."
            )
        return replace(each, name=spec.name, parent=spec.parent)

    # --- training and measuring -----------------------------------------------------------------

    def train(self) -> Trainer:
        """Train by the method, from where an interrupted run stopped; returns the trainer."""
        with torch.random.fork_rng(devices=[]):
            self.method.prepare(self)
            self.trained = self.trainer(self.method, self.folder / TUNING)
            self.trained.train()
        self.model.eval()
        return self.trained

    def train_new(self, steps: int, settings: TuningSettings) -> None:
        """Train what is new alone, as `head` does, before a method that trains more; resumable.

        Nothing is done where the folder holds a state of the training that follows, which has that
        as well, nor where no class is new.

        Args:
            steps: How long, at most; 0 for not at all.
            settings: Of the method that follows.
        """
        if not (steps and self.added) or (self.folder / TUNING / LAST).is_dir():
            return
        asked = {name: tensor.requires_grad for name, tensor in self.model.named_parameters()}
        head = Head(
            steps=steps,
            voxels=settings.voxels,
            windows=settings.windows,
            balance=settings.balance,
            precision=settings.precision,
        )
        self.trainer(head, self.folder / TUNING / PROBE).train()
        for name, tensor in self.model.named_parameters():
            tensor.requires_grad_(asked[name])

    def trainer(self, method: Method, folder: Path) -> Trainer:
        """Return what trains the model by a method, with its state in `folder`."""
        rates = method.rates(self.model)
        for name, tensor in self.model.named_parameters():
            tensor.requires_grad_(name in rates)
        feed = method.feed(self)
        exclusive = exclusive_classes(feed.classes, self.model, self.added).to(self.model.device)
        distil = getattr(method, "distil", 0.0) if feed.teacher is not None else 0.0
        task = TuningTask(
            model=self.model,
            settings=method,
            feed=feed,
            rates=rates,
            objective=partial(tuning_losses, exclusive=exclusive, distil=distil),
            terms=("dice", "binary", "exclusive", *(["distil"] if distil else [])),
            classes=self.learnt,
            identity=identity(self.base, self.data, self.learnt, method, self.seed),
        )
        return task.trainer(self.accelerator, folder, seed=self.seed, progress=self.progress)

    def measure(self, when: str) -> Scores:
        """Score all classes on the measured scans; keeps masks for the report.

        Args:
            when: BEFORE or AFTER the training.
        """
        names = (*self.learnt, *self.old)
        return self._on_main(
            lambda: evaluate(
                self.model.eval(),
                self.measured,
                names,
                masks=self.folder / MASKS / when,
                keep=self.base.classes if when == BEFORE else names,
                tolerance_mm=self.tolerance_mm,
                progress=self.shows_bars,
            )
        )

    def agreement(self) -> Scores:
        """Compare the old classes with those before, in scans that do not label them."""
        masks = self.folder / MASKS
        return agreement(masks / BEFORE, masks / AFTER, self.measured, self.old, self.tolerance_mm)

    def _on_main(self, work: Callable[[], _T]) -> _T:
        """What rank 0 finds, on all processes."""
        if self.accelerator.num_processes == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        found: list[Any] = [work() if self.accelerator.is_main_process else None]
        broadcast_object_list(found)
        result: _T = found[0]
        return result

    # --- what it leaves -------------------------------------------------------------------------

    def finish(self, before: Scores, after: Scores) -> Tuned:
        """Save what was trained, with a card of its results, and write the report.

        Args:
            before: Scores of `measure(BEFORE)`.
            after: Scores of `measure(AFTER)`.
        """
        agreed = self.agreement()
        return Tuned(
            model=self.model,
            saved=self.save(before, after, agreed),
            new=self.learnt,
            old=self.old,
            before=before,
            after=after,
            agreement=agreed,
            neighbours={each.name: each.neighbours for each in self.expected},
            best_step=self.trained.best_step,
            report=self.report(before, after, agreed),
        )

    def save(self, before: Scores, after: Scores, agreed: Scores) -> Path:
        """Write the model, or the adapter alone; return the folder.

        Args:
            before: As of `finish`.
            after: As of `finish`.
            agreed: What `agreement` found.
        """
        names = [name for name in (*self.learnt, *self.old) if name in after.classes]
        results = Results(
            dataset=self.source.name,
            split="test" if self.data.test else "validation",
            scans=len(after.cases),
            dice={name: after.mean([name]) or 0.0 for name in names},
            surface_dice={name: after.mean([name], "nsd") or 0.0 for name in names},
            tolerance_mm=self.tolerance_mm,
            agreement={name: agreed.mean([name]) or 0.0 for name in agreed.classes},
        )
        facts = [
            "## Training",
            "",
            *(f"- {key}: {value}" for key, value in self.lineage.items()),
            f"- best step: {self.trained.best_step} of {self.trained.step}",
            *(f"- Dice before, {name}: {before.mean([name]) or 0:.3f}" for name in names),
        ]
        return self._on_main(lambda: self.method.save(self, results, "\n".join(facts)))

    @property
    def lineage(self) -> dict[str, str]:
        """Where the tuned model comes from: base, data, method, seed."""
        data = self.data
        settings = {"name": self.method.name, **asdict(self.method)}
        return {
            "base model": self.base.config.name,
            "SHA-256 of its weights, in half precision": base_sha256(self.base),
            "data": f"{data.layout}, SHA-256 {data.digest}",
            "scans": f"{len(data.train)} to train, {len(data.validation)} to validate, "
            f"{len(data.test)} to test",
            "method": ", ".join(f"{key} {value}" for key, value in settings.items()),
            "seed": str(self.seed),
        }

    def report(self, before: Scores, after: Scores, agreed: Scores) -> Path:
        """Write report.html and report.csv; return the page. Arguments as of `save`."""
        report = Report(
            title=f"{', '.join(self.learnt)}: {self.method.name}",
            lineage=self.lineage,
            new=self.learnt,
            old=self.old,
            before=before,
            after=after,
            agreement=agreed,
            measured_on="test scans" if self.data.test else "validation scans",
            before_is="the model as it was" if not self.added else "by the prompt alone",
            training=(Curve("validation Dice", validation_curve(self.folder / TUNING)),),
            cases=self.measured,
            masks=self.folder / MASKS / AFTER,
            notes=(*self.data.notes, *(each.note for each in self.expected)),
        )
        return self._on_main(lambda: write_report(self.folder, report))


def grown(
    base: UniversalModel, wanted: Sequence[NewClass], method: Method, seed: int
) -> tuple[UniversalModel, tuple[Expectation, ...]]:
    """Copy a model and give it the classes that it does not have, by their prompts, untrained.

    Args:
        base: It is not changed.
        wanted: Classes to learn.
        method: Decides what they get of their own.
        seed: Of the new weights.

    Returns:
        The copy, and what to expect of each new class before training.
    """
    model, text = copy.deepcopy(base), base.config.text
    added = [
        ClassSpec(each.name, each.prompt or class_prompt(each.name, text), each.parent)
        for each in wanted
        if each.name not in base.classes
    ]
    known = [each.name for each in wanted if each.name in base.classes]
    if added and known and method.replaces_known:
        raise UsageError(
            f"The model has {listed(known)} and not {listed([spec.name for spec in added])}; "
            f"method {method.name} learns known and new classes apart. Give them one after the "
            "other, or use lora, full or continual."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if known and method.replaces_known:
            replace_classes(model, known, width=method.width)
        if not added:
            return model, ()
        return model, add_classes(model, added, kind="side", width=method.width)


def validation_curve(folder: Path) -> tuple[tuple[float, float], ...]:
    """Return step and mean Dice of each validation of a tuning."""
    path = folder / VALIDATION
    if not path.is_file():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        return tuple((float(row["step"]), float(row["mean"])) for row in csv.DictReader(file))
