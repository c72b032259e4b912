"""One tuning: a model, scans and a method, from reading the scans to the report.

    run = TuningRun(from_pretrained("universal-ct"), Head(), Path("runs/l1"))
    run.read("scans", ["vertebra L1"])
    before = run.measure(BEFORE)
    run.train()
    after = run.measure(AFTER)
    saved, page = run.save(before, after), run.report(before, after)

`finetune` does the same in one call.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from foundation.adapting.adapters import base_sha256
from foundation.adapting.classes import Expectation, add_classes
from foundation.config import ClassSpec
from foundation.data.naming import NewClass
from foundation.errors import UsageError
from foundation.evaluation.agreement import agreement, card_section
from foundation.evaluation.charts import Curve
from foundation.evaluation.report import Report, write_report
from foundation.evaluation.scores import Scores, evaluate
from foundation.files import replacing
from foundation.hardware import keep_freed_memory
from foundation.hub.saved import CARD
from foundation.inference.predict import choose_device
from foundation.model import UniversalModel
from foundation.taxonomy import NAMES, normalise
from foundation.text import class_prompt
from foundation.training.losses import EXCLUSIVE
from foundation.training.schedule import Schedule, ScheduleConfig
from foundation.training.trainer import (
    VALIDATION,
    Batch,
    Precision,
    Trainer,
    TrainerConfig,
    accelerator_for,
)
from foundation.tuning.data import TuningData, read_data
from foundation.tuning.feeds import Feed, runs_in_bfloat16
from foundation.tuning.methods import Method
from foundation.tuning.objective import tuning_losses

if TYPE_CHECKING:
    from accelerate import Accelerator

TUNING, DATA, MASKS, PROBE = "tuning", "data", "masks", "probe"  # folders within a run's
BEFORE, AFTER = "before", "after"  # when a run measures; folders within the masks
_CLIP_NORM = 5.0
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
    data: TuningData = field(init=False)
    model: UniversalModel = field(init=False)
    expected: tuple[Expectation, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.device = choose_device(self.device)
        self.device = self.accelerator.device
        self.shows_progress = self.progress and self.accelerator.is_main_process
        if self.device.type == "cpu":
            keep_freed_memory()  # half of a step's time

    @cached_property
    def accelerator(self) -> Accelerator:
        """Of all that the run trains: its device, its processes and its precision."""
        return accelerator_for(self.precision(self.method), self.device)

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
        with self.accelerator.main_process_first():
            self.data = read_data(
                data,
                classes=wanted,
                work=self.folder / DATA,
                spacing_mm=self.base.config.preprocessing.spacing_mm[0],
                test=test,
                validation=validation,
                seed=self.seed,
                old_classes=self.base.classes,
                workers=1,  # others would start the caller's script anew without a main guard
                progress=self.shows_progress,
            )
        self.model, self.expected = grown(self.base, wanted, self.method, self.seed)
        self.model.to(self.device)
        if self.shows_progress:  # before hours of training, not after
            print(*self.expected, sep="\n", file=sys.stderr)

    def _wanted(self, given: NewClass | str) -> NewClass:
        """A class to learn; a known one under its own name, with its own parent."""
        each = given if isinstance(given, NewClass) else NewClass(given)
        known = {normalise(spec.name): spec for spec in self.base.config.classes}
        if (spec := known.get(normalise(each.name))) is None:
            return each
        if not self.method.tunes_known:
            raise UsageError(
                f"{spec.name!r} is a class of the model, and method {self.method.name} does not "
                "change those. Tune it by lora, full or continual, or give a new class another "
                "name."
            )
        if each.prompt is not None and each.prompt != spec.prompt:
            raise UsageError(
                f"{spec.name!r} is a class of the model with the prompt {spec.prompt!r}, which "
                "stays. Leave the prompt out, or give a new class another name."
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

    def trainer(self, method: Method, folder: Path) -> Trainer:
        """Return what trains the model by a method, with its state in `folder`."""
        config = TrainerConfig(
            steps=method.steps,
            seed=self.seed,
            clip_norm=_CLIP_NORM,
            save_every=method.save_every,
            validate_every=method.validate_every,
            patience=method.patience,
            restores_best=True,
            title=method.name,
        )
        return Trainer(self.task(method), config, self.accelerator, folder, progress=self.progress)

    def task(self, method: Method) -> TuningTask:
        """Return what is trained by a method, and by which loss."""
        return TuningTask(self, method)

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
                progress=self.shows_progress,
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

        found = [work() if self.accelerator.is_main_process else None]
        broadcast_object_list(found)
        result: Any = found[0]
        return result

    # --- what it leaves -------------------------------------------------------------------------

    def save(self, before: Scores, after: Scores) -> Path:
        """Write the model, or the adapter alone, with a card of its results; returns the folder.

        Args:
            before: Scores of `measure(BEFORE)`.
            after: Scores of `measure(AFTER)`.
        """

        def write() -> Path:
            folder = self.method.save(self)
            card = folder / CARD
            text = card.read_text(encoding="utf-8").rstrip() + "\n\n"
            with replacing(card) as temporary:
                text += "\n".join(self._results(before, after)) + "\n"
                temporary.write_text(text, encoding="utf-8")
            return folder

        return self._on_main(write)

    def _results(self, before: Scores, after: Scores) -> list[str]:
        """Lines of a card in Markdown: where the model comes from, and what it reached."""
        rows = [
            f"| {name} | {before.mean([name]) or 0:.3f} | {after.mean([name]):.3f} "
            f"| {after.mean([name], 'nsd'):.3f} |"
            for name in (*self.learnt, *self.old)
            if name in after.classes
        ]
        return [
            "## Lineage",
            "",
            *(f"- {key}: {value}" for key, value in self.lineage.items()),
            f"- best step: {self.trained.best_step} of {self.trained.step}",
            "",
            "## Results",
            "",
            f"On {len(after.cases)} {'test' if self.data.test else 'validation'} scans, at "
            f"{after.spacing_mm:g} mm; surface Dice with a tolerance of {after.tolerance_mm:g} mm.",
            "",
            "| class | Dice before | Dice | surface Dice |",
            "|-|-|-|-|",
            *rows,
            *card_section(self.agreement()),
        ]

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

    def report(self, before: Scores, after: Scores) -> Path:
        """Write report.html and report.csv; returns the page. Arguments as of `save`."""
        report = Report(
            title=f"{', '.join(self.learnt)}: {self.method.name}",
            lineage=self.lineage,
            new=self.learnt,
            old=self.old,
            before=before,
            after=after,
            agreement=self.agreement(),
            measured_on="test scans" if self.data.test else "validation scans",
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
        wanted: Classes to learn; known ones are left as they are.
        method: Decides the width of what they get of their own.
        seed: Of the new weights.

    Returns:
        The copy, and what to expect of each new class before training.
    """
    model, text = copy.deepcopy(base), base.config.text
    specs = [
        ClassSpec(each.name, each.prompt or class_prompt(each.name, text), each.parent)
        for each in wanted
        if each.name not in base.classes
    ]
    if not specs:
        return model, ()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model, add_classes(model, specs, kind="side", width=method.width)


# --- what the trainer asks for --------------------------------------------------------------------


class TuningTask:
    """A tuning as the trainer takes it; see `training.trainer.Task`.

    Args:
        run: Its model, scans and seed.
        method: What is trained; that of the run, or the one that it begins with.

    Raises:
        UsageError: No training scan shows a class to learn.
    """

    sources: tuple[str, ...] = ()

    def __init__(self, run: TuningRun, method: Method) -> None:
        self.method, self.published = method, run.model
        self.rates = method.rates(run.model)
        for name, tensor in run.model.named_parameters():
            tensor.requires_grad_(name in self.rates)
        self.feed: Feed = method.feed(run)
        self.classes = run.learnt
        self.schedule = Schedule(ScheduleConfig("cosine_to_floor", method.warm_up), method.steps)
        distil = getattr(method, "distil", 0.0) if getattr(self.feed, "teacher", None) else 0.0
        self.terms = ("dice", "binary", "exclusive", *(["distil"] if distil else []))
        exclusive = exclusive_classes(self.feed.classes, run.model, run.added).to(run.device)
        self.objective = partial(tuning_losses, exclusive=exclusive, distil=distil)
        self.identity = identity(run.base, run.data, run.learnt, method, run.seed)

    @property
    def network(self) -> nn.Module:
        """As `Task.network`."""
        return self.feed.network

    def optimizer(self) -> torch.optim.Optimizer:
        """As `Task.optimizer`: a group for each learning rate."""
        by_rate: dict[float, list[nn.Parameter]] = {}
        for name, tensor in self.published.named_parameters():
            if name in self.rates:
                by_rate.setdefault(self.rates[name], []).append(tensor)
        return torch.optim.AdamW(
            [{"params": found, "lr": rate, "initial_lr": rate} for rate, found in by_rate.items()],
            weight_decay=self.method.weight_decay,
        )

    def factor(self, step: int) -> float:
        """As `Task.factor`."""
        return 1.0

    def batches(self, first_step: int, rank: int, processes: int) -> Iterator[list[Batch]]:
        """As `Task.batches`; all processes take consecutive samples, as one would of more."""
        size, several = self.method.batch_size, self.method.accumulation
        for step in range(first_step, self.method.steps):
            firsts = [
                ((step * several + place) * processes + rank) * size for place in range(several)
            ]
            yield [self.feed.batch(range(first, first + size)) for first in firsts]

    def losses(
        self, forward: Callable[..., Any], batch: Batch, step: int, accelerator: Accelerator
    ) -> dict[str, Tensor]:
        """As `Task.losses`; the balance between classes falls with the learning rate."""
        balance = self.method.balance * self.schedule.share(step)
        return self.objective(self.feed.forward(forward, batch, accelerator), balance)

    def validate(self, trainer: Trainer) -> Mapping[str, Tensor]:
        """As `Task.validate`."""
        accelerator = trainer.accelerator
        return self.feed.validate(accelerator.process_index, accelerator.num_processes)

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """As `Task.scores`."""
        return self.feed.scores(sums)

    def improved(self, trainer: Trainer) -> None:
        """As `Task.improved`: the trainer keeps the best weights."""


def exclusive_classes(
    classes: Sequence[str], model: UniversalModel, added: Sequence[str]
) -> Tensor:
    """Return of which classes a voxel has at most one, bool (K,): organs, and new ones like them.

    Args:
        classes: Names, in the order of the result.
        model: Has them all.
        added: Those that are new; without a parent they count as organs.
    """
    known = dict(zip(NAMES, EXCLUSIVE.tolist(), strict=True))
    parents = {spec.name: spec.parent for spec in model.config.classes}
    return torch.tensor(
        [parents[name] is None if name in added else known.get(name, False) for name in classes]
    )


def identity(
    base: UniversalModel, data: TuningData, learnt: Sequence[str], method: Method, seed: int
) -> dict[str, object]:
    """Return what a resumed tuning must agree in, as JSON gives it back."""
    settings = {"name": method.name, **asdict(method)}
    for free in ("save_every", "patience"):
        settings.pop(free)
    state = hashlib.sha256()
    for name, value in sorted(base.state_dict().items()):
        if isinstance(value, Tensor):
            state.update(name.encode())
            state.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    found = {
        "model": state.hexdigest(),
        "data": data.digest,
        "classes": list(learnt),
        "method": settings,
        "seed": seed,
    }
    plain: dict[str, object] = json.loads(json.dumps(found))
    return plain


def validation_curve(folder: Path) -> tuple[tuple[float, float], ...]:
    """Return step and mean Dice of each validation of a tuning."""
    path = folder / VALIDATION
    if not path.is_file():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        return tuple((float(row["step"]), float(row["mean"])) for row in csv.DictReader(file))
