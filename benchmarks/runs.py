"""One run of an experiment: an arm with one seed, which trains and measures.

    def measure(run: Run) -> Iterable[Figure]:
        model = run.pretrain({"model.text": run.arm["text"]})
        return run.figures(run.score(model))

In the generated sizes, a training is done once for all scripts that ask for the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment_data import TestSet
from verdicts import figures_of

from foundation import (
    UniversalModel,
    UsageError,
    from_pretrained,
    get_dataset,
    listed,
    pretrain,
)
from foundation.evaluation import Figure, Scores, path_sha256, score_dataset
from foundation.pretraining import FOLDS, trained_on

if TYPE_CHECKING:
    from lab import Lab

LARGE = "dice/large organs"
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # of several that train together
Arm = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        lab: The experiment.
        arm: What is varied → its value here.
        seed: Of all chance; None where nothing is drawn.
        notes: Sentences for the record.
    """

    lab: Lab
    arm: Arm
    seed: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Of what this run makes."""
        return self.lab.output / "runs" / f"{slug(self.arm)}-{self.seed}"

    @property
    def cpu(self) -> bool:
        """Whether GPUs are left alone."""
        return self.lab.generated and not self.lab.given.gpu

    def steps(self, planned: int) -> int:
        """Return how many steps a training takes: as planned, or `--max-steps`."""
        most = self.lab.given.max_steps
        return planned if most is None else min(planned, most)

    def pretrain(self, changes: Mapping[str, Any] | None = None, **options: Any) -> UniversalModel:
        """Train a model from random weights, or load it if that is done; see `train`."""
        return from_pretrained(self.train(changes, **options))

    def train(
        self,
        changes: Mapping[str, Any] | None = None,
        *,
        config: str = "unet",
        like: Sequence[str] | None = None,
        fold: int | None = None,
        name: str = "training",
        store: Path | None = None,
        only: Sequence[str] | None = None,
        share: int = 1,
    ) -> Path:
        """Train a model from random weights, or go on where it stopped.

        In the generated sizes, scripts that ask for the same settings, seed and data share the
        training. The seconds of a record are of what was done for it alone.

        Args:
            changes: Dotted key of the configuration → value, over those of the plan.
            config: The configuration of the real size, which the plan changes.
            like: Datasets of the world; see `Data.training`.
            fold: Held out of the five folds.
            name: Of the training's folder, where a run has several.
            store: In place of the lab's, of the same datasets.
            only: Ids of the datasets in the store that are drawn from; all if not given.
            share: Take this part of the steps: 6 for a sixth.

        Returns:
            The model's folder: the last weights where the held-out fold is what is measured, the
            best ones on it where `--test` names other scans.
        """
        plan, store = self.lab.plan, store or self.lab.data.store(like)
        settings = {**plan.settings, "seed": self.seed or 0, **(changes or {})}
        if self.lab.generated:
            stage = {"steps": plan.steps, "patch_size": plan.patch, "batch_size": 2}
            stage |= {"spacing_mm": self.lab.data.world.spacing_mm}
            ids = only or [get_dataset(dataset).id for dataset, _ in self.lab.data.training(like)]
            settings = {
                "stages": [stage],
                "sources": [{"kind": "scans", "datasets": list(ids)}],
                **settings,
            }
        else:
            settings = {"sources": _sources_of(config, store, only), **settings}
        if fold is not None:
            settings |= {"validation.fold": fold, "validation.folds": str(self.lab.data.folds)}
            if not self.lab.given.test:  # weights that are best on what is measured look too good
                settings["validation.every"] = 0
        elif self.lab.generated or self.lab.given.test:
            settings["validation.fold"] = None
        if self.lab.given.max_steps is not None or share > 1:
            most = self.lab.given.max_steps or 10**9
            settings |= _shortened(config, settings, most, share)
        overrides = [*_overrides(settings), *self.lab.given.settings]
        train = partial(
            pretrain,
            config,
            store=store,
            overrides=overrides,
            cpu=self.cpu,
            progress=not self.lab.generated,
        )
        if self.lab.generated:
            saved = self._shared(
                train, [config, *sorted(overrides), path_sha256(store / "manifest.json")]
            )
        else:
            saved = train(output=self.folder / name)
        best = saved.parent / "best"
        return best if best.is_dir() else saved

    def _shared(self, train: Callable[..., Path], known: Sequence[str]) -> Path:
        """Train in a folder that is named by all that the result depends on, but for the code."""
        key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
        with self.lab.data.alone(f"trainings-{self.lab.size}/{key}") as folder:
            by = folder.with_suffix(".commit")
            if folder.is_dir():
                begun = by.read_text(encoding="utf-8").strip() if by.is_file() else ""
                code = "" if begun in ("", self.lab.commit) else f", by the code of {begun[:12]}"
                self.notes.append(
                    f"Its training had been begun before{code}; these seconds do not hold it."
                )
            else:
                by.write_text(f"{self.lab.commit}\n", encoding="utf-8")
            return train(output=folder)

    def pretrain_and_score(self, changes: Mapping[str, Any] | None = None) -> list[Figure]:
        """Train from random weights and measure Dice; in the real size, on the first fold.

        Args:
            changes: As of `pretrain`.
        """
        model = self.pretrain(changes, fold=self.lab.data.fold)
        return self.figures(self.score(model, self.lab.data.tests(fold=self.lab.data.fold)))

    def figures(self, scores: Scores, classes: Sequence[str] | None = None) -> list[Figure]:
        """Turn scores into figures; in the generated sizes also the mean over large organs.

        Args:
            scores: Of this run.
            classes: Those of the mean over all; all that were measured if not given.
        """
        found = figures_of(scores, classes)
        if self.lab.generated:
            large = self.lab.data.world.large_organs
            interval = scores.interval(large) or (None, None)
            found.append(
                Figure(LARGE, scores.mean(large), "", *interval, n=len(scores.by_case(large)))
            )
        return found

    def unseen(self, test: TestSet, weights: str | Path) -> TestSet:
        """Leave out the scans that weights were trained on, and note which in the record.

        Args:
            test: The scans.
            weights: A name or a folder; see `trained_on`.

        Returns:
            The other scans.

        Raises:
            UsageError: The weights were trained on all of them.
        """
        dataset, trained = get_dataset(test.dataset), trained_on(weights)
        if trained is None:
            self.notes.append(
                f"{dataset.name}: what the weights were trained on is not recorded, so that "
                "nothing could be left out."
            )
            return test
        cases = [c for c in dataset.find(test.root) if test.cases is None or c.id in test.cases]
        seen = trained.among(dataset, cases)
        if not seen:
            return test
        kept = tuple(case.id for case in cases if case.id not in seen)
        if not kept:
            raise UsageError(f"The weights were trained on every scan of {dataset.name}.")
        names = listed([f"{case} ({key})" for case, key in seen.items()], 20)
        self.notes.append(f"{dataset.name}: left out, since the weights saw them: {names}.")
        return replace(test, cases=kept)

    def cross_validate(
        self,
        classes: Mapping[str, Sequence[str]],
        *,
        like: Sequence[str] | None = None,
        **options: Any,
    ) -> Scores:
        """Train once for each fold, and measure the fold with the model that has not seen it.

        The last weights are measured; the paper takes those that are best on the fold.

        Args:
            classes: Id of each dataset to measure on → the classes that count there.
            like: As of `pretrain`.
            **options: As of `score`.

        Returns:
            The scores of every scan, each from one model.
        """
        self.lab.data.store(like)
        parts = []
        for fold in range(FOLDS):
            named = [(get_dataset(test.dataset).id, test) for test in self.lab.data.held_out(fold)]
            measured = [(name, test) for name, test in named if name in classes]
            if not measured:
                continue  # a tiny dataset has no scan in some folds
            model = self.pretrain(like=like, fold=fold, name=f"fold{fold}")
            for name, test in measured:
                title = f"fold{fold}.{name}"
                parts.append(
                    self.score(model, [test], classes=classes[name], name=title, **options)
                )
        if not parts:
            raise UsageError(f"None of {', '.join(classes)} is among the data. Give it as ID=DIR.")
        return Scores.joined(parts)

    def score(
        self,
        model: Any,
        tests: Sequence[TestSet] | None = None,
        *,
        classes: Sequence[str] | None = None,
        name: str = "test",
        tolerance_mm: float | Mapping[str, float] | None = None,
        **options: Any,
    ) -> Scores:
        """Measure a model on scans on their own grid, and keep the scores.

        Args:
            model: Any network that can be segmented with.
            tests: The scans; the lab's if not given.
            classes: All that the model has and a scan labels, if not given.
            name: Of the scores; `Lab.scores` reads them by it.
            tolerance_mm: Of the surface Dice, which is not computed if not given.
            **options: As of `evaluate_dataset`.

        Returns:
            The scores.
        """
        path = self.lab.scores_file(self.arm, self.seed, name)
        while not (path.is_file() or MAIN_PROCESS):
            time.sleep(5)  # the first of several processes measures
        if path.is_file():
            return Scores.read(path)
        options.setdefault("overlap", 0.25 if self.lab.generated else 0.5)
        options.setdefault("device", "cpu" if self.cpu else "auto")
        options |= {"classes": classes, "tolerance_mm": tolerance_mm}
        done = path.with_suffix("")  # a file for each scan, so that a killed measurement goes on
        done.mkdir(parents=True, exist_ok=True)
        parts = []
        for test in self.lab.data.tests() if tests is None else tests:
            dataset = get_dataset(test.dataset)
            cases = test.cases
            if cases is None:
                cases = tuple(case.id for case in dataset.find(test.root))
            files = {
                case: done / f"{slug({'case': f'{dataset.id}/{case}'})}.json" for case in cases
            }
            left = [case for case, file in files.items() if not file.is_file()]
            for case, found in score_dataset(model, dataset, test.root, cases=left, **options):
                found.write(files[case])
            parts += [Scores.read(file) for file in files.values()]
        scores = Scores.joined(parts)
        scores.write(path)
        shutil.rmtree(done)
        return scores


# --- helpers ---


def slug(arm: Arm) -> str:
    """Return a name for an arm's files, which no other arm has."""
    text = "_".join(map(str, arm.values()))
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", text)
    if name != text.replace(" ", "_"):  # signs are lost: two texts may come to one name
        name = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return name or "only"


def _shortened(config: str, settings: Mapping[str, Any], most: int, share: int) -> dict[str, Any]:
    """Settings by which a training takes a part of its steps, and at most so many."""
    from foundation.pretraining import load_config

    full = load_config(config, _overrides(settings))
    steps = [max(1, min(stage.steps // share, most)) for stage in full.stages]
    return {
        **{f"stages.{i}.steps": each for i, each in enumerate(steps)},
        "schedule.warm_up": min(full.schedule.warm_up // share, sum(steps) // 2),
    }


def _sources_of(config: str, store: Path, only: Sequence[str] | None) -> list[dict[str, Any]]:
    """The sources of a configuration, without the datasets that the store or `only` lacks.

    A dataset that the configuration does not know is drawn as its first ones are.
    """
    from foundation.data import Store
    from foundation.pretraining import load_config

    there = sorted({key.split("/")[0] for key in Store(store).manifest["cases"]})
    there = [name for name in there if only is None or name in only]
    sources = [asdict(each) for each in load_config(config).sources if each.kind == "scans"]
    known = {name for each in sources for name in each["datasets"]}
    own = [name for name in there if name not in known]
    found = [{**s, "datasets": [n for n in s["datasets"] if n in there]} for s in sources]
    found += [{**source, "datasets": own} for source in sources[:1]]
    return [source for source in found if source["datasets"]]


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
