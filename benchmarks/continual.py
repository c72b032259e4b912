"""Classes added step by step: what is forgotten, by method, and by naive fine-tuning.

    python benchmarks/continual.py --smoke
    python benchmarks/continual.py --mini
    python benchmarks/continual.py 15=DIR -m universal-ct -o OUT     # TotalSegmentator
    … --steps-of sacrum+hip_left,hip_right,autochthon_left+autochthon_right

Protocol
- Data: as of class_from_prompt.py. Each step has scans of its own, which label the step's classes
  and nothing else. No scan of an earlier step is seen again.
- Start. Real: the weights of -m. Generated: trained on the ten partly labelled datasets of the
  world, once for each seed.
- Steps: one after the other, each from the model that the step before left; an adapter of lora is
  merged into it.
- Methods: head, lora, full and continual, with their own settings. Naive fine-tuning: all of the
  network at the full rate, once with a loss that leaves unlabelled classes out (masked), once with
  one that takes them as absent (background). Numbers of optimiser steps are equal.
- Metric: Dice on the scan's own grid, after each step: of the weights' organs (old; in the
  generated sizes the large ones), and of the classes added so far (added), where a test scan shows
  them. Forgetting of the old classes: their mean before the first step less that after the last.
- Statistic: differences on the same scans, with a bootstrap over seeds and scans.
- Published: Zhang et al., MICCAI 2023 (arXiv 2306.00988), of which `continual` is the method, with
  one deviation: the old classes keep their common head. Its tables are unknown (U).

Hardware. Real: one GPU; time not measured. Mini: two CPU cores, about 40 minutes
where two processes share the seeds (--seeds).
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from lab import Lab, add_model, run_script
from plots import by_seed, curves
from runs import Run
from sizes import plans
from structures import (
    Structures,
    few_scans,
    hashes_of,
    learn,
    open_structures,
    start_of,
    test_sets,
)
from verdicts import figures_of

from foundation import CLASSES, UsageError
from foundation.evaluation import Figure, Scores, paired_bootstrap

STEPS = "sacrum+hip_left,autochthon_left+autochthon_right,iliopsoas_left+iliopsoas_right"
# One rate for all that was trained before and for what is new, and no probe of it before.
NAIVE: Mapping[str, Any] = {"backbone_rate": 1.0, "layer_decay": 1.0, "probe": 0}
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "head": ("head", {}),
    "lora": ("lora", {}),
    "full": ("full", {}),
    "continual": ("continual", {}),
    "naive, masked": ("full", {**NAIVE, "protect": "mask"}),
    "naive, background": ("full", {**NAIVE, "protect": "nothing"}),
}
SMOKE = ("lora", "naive, background")
PLANS = plans(
    mini={"of": STEPS, "scans": 3, "steps": 50, "probe": 150},
    smoke={"of": "sacrum,hip_left", "scans": 1, "steps": 1, "probe": 1},
    real={"of": STEPS, "scans": 5, "steps": 150, "probe": 360},
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add what it starts from, and what each step adds."""
    add_model(parser, "universal-ct")
    text = "classes of each step: steps apart by commas, classes by +"
    parser.add_argument("--steps-of", help=f"{text}; {STEPS} if not given")
    parser.add_argument("--scans", type=int, help="of each step, in place of the plan's")


def old_classes(lab: Lab) -> list[str]:
    """Return the organs by which forgetting is measured: what weights hardly find is not forgotten.

    Args:
        lab: In the generated sizes it is the large ones; otherwise all but lesions.
    """
    every = [each.name for each in CLASSES if each.parent is None]
    return lab.data.world.large_organs if lab.generated else every


def steps_of(text: str) -> list[list[str]]:
    """Read what each step adds.

    Args:
        text: "a+b,c": a and b in the first step, c in the second.

    Raises:
        UsageError: A step is empty, or a class comes twice.
    """
    steps = [[name.strip() for name in step.split("+")] for step in text.split(",")]
    names = [name for step in steps for name in step]
    if not all(names) or len({*names}) < len(names):
        raise UsageError(f"--steps-of {text}: give each class once, as in {STEPS}.")
    return steps


def settings_of(method: str, steps: int, probe: int) -> dict[str, Any]:
    """Return the settings of a method's tuning; every method takes steps + probe in all.

    Args:
        method: A key of `METHODS`.
        steps: In which the network is trained.
        probe: Before, in which what is new is trained alone.
    """
    name, own = METHODS[method]
    settings = {"steps": steps, "probe": probe, **own}
    if name == "head":
        settings.pop("probe")
    if not settings.get("probe"):
        settings["steps"] = steps + probe
    return {**settings, "validate_every": max(1, settings["steps"] // 2), "patience": 10**6}


def measure(run: Run, found: Structures, steps: Sequence[Sequence[str]]) -> Iterable[Figure]:
    """Add the classes of all steps, and measure before the first and after each."""
    lab, options, method = run.lab, run.lab.plan.options, str(run.arm["method"])
    count = lab.given.scans or options["scans"]
    names = [name for step in steps for name in step]
    cases = list(islice(found.showing(names, run.seed or 0), count * len(steps)))
    if lab.size == "smoke":
        cases = cases[:1] * len(steps)  # there is one scan
    if len(cases) < count * len(steps):
        raise UsageError(
            f"{len(steps)} steps of {count} scans need {count * len(steps)} training scans that "
            f"show all classes of the steps; there are {len(cases)}. Give --scans."
        )
    tests, model = test_sets(lab, found, names), start_of(run)
    old, added = [n for n in old_classes(lab) if n in model.classes], list[str]()
    first = last = run.score(model, tests, classes=old, name="step0")
    yield from figures(first, old, added, 0)
    for number, names in enumerate(steps, start=1):
        own = cases[(number - 1) * count : number * count]
        scans = few_scans(found, own, names, run.folder / f"scans{number}")
        settings = settings_of(method, options["steps"], options["probe"])
        model = learn(run, model, scans, names, METHODS[method][0], settings, f"step{number}")
        if model.adapters.active:
            model = model.merge_adapter()
        added += names
        last = run.score(model, tests, classes=[*old, *added], name=f"step{number}")
        yield from figures(last, old, added, number)
    tables = [scores.table(old, "dice", first.cases)[None] for scores in (first, last)]
    lost = paired_bootstrap(*tables)
    low, high = lost.interval or (None, None)
    yield Figure("forgotten", lost.mean, "", low, high, lost.pairs)


def figures(
    scores: Scores, old: Sequence[str], added: Sequence[str], number: int
) -> Iterable[Figure]:
    """Yield the mean over the old and over the added classes after a step; 0 is before the first.

    Args:
        scores: After the step.
        old: Organs of the weights.
        added: Classes of the steps so far.
        number: Of the step.
    """
    for title, names in (("old", old), ("added", added)):
        if names:
            mean = figures_of(scores, list(names))[0]
            yield replace(mean, name=f"dice/{title} {number}")


def main() -> None:
    """Run all methods, compare them, draw what is kept of the old classes."""
    lab = Lab.parse(__doc__, PLANS, add_arguments, prepares=False)
    steps = steps_of(lab.given.steps_of or lab.plan.options["of"])
    found = open_structures(lab, [lab.given.model])
    weights, note = hashes_of(lab, lab.given.model), found.note
    for arm in lab.arms({"method": list(METHODS)}):
        if lab.size != "smoke" or arm["method"] in SMOKE:
            function = partial(measure, found=found, steps=steps)
            lab.measure(arm, function, weights=weights, note=note)
    last, added = f"step{len(steps)}", [name for step in steps for name in step]
    naive = {"method": "naive, background"}
    for name in [name for name in METHODS if name != naive["method"]]:
        arm = {"method": name}
        question = f"Are old classes kept better by {name}?"
        lab.verdict(question, arm, naive, classes=old_classes(lab), scores=last)
        lab.verdict(f"Are new classes learnt by {name}?", arm, naive, classes=added, scores=last)
    places = range(len(steps) + 1)
    lines = {
        name: {
            float(place): by_seed(lab.records(), f"dice/old {place}", {"method": name})
            for place in places
        }
        for name in METHODS
    }
    title = "What is kept of the old classes"
    picture = curves(
        lab.output / "old.png", lines, "steps taken", "mean Dice of the old classes", title
    )
    lab.finish([picture])


if __name__ == "__main__":
    run_script(main)
