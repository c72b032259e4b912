"""A new class from a prompt and 1, 2, 5 or 10 scans: by method, embedding and start.

    python benchmarks/class_from_prompt.py --smoke
    python benchmarks/class_from_prompt.py --mini
    python benchmarks/class_from_prompt.py 15=DIR -m universal-ct -o OUT     # real data
    … --classes sacrum hip_left vertebrae_L3 --only method=full

Protocol
- Data. Real: TotalSegmentator (15 for version 1, 15_v2 for version 2), whose meta.csv gives the
  splits. Generated: scans of other bodies than the weights were trained on.
- New classes: a bone of the middle, one of a pair, and a muscle of a pair, learnt together. The
  weights do not know them. The training scans label nothing else.
- Scans to learn from: nested, by seed, each of which shows all of the new classes.
- Start. Weights: Real: -m. Generated: trained on the ten partly labelled datasets of the world,
  once for each seed. Scratch: the same network with random weights.
- Embedding: text (MiniLM, or the weights' own), or a one-hot vector. Generated only: weights that
  were trained with one-hot vectors, with places to spare.
- Method: head, lora, full, continual, with their own settings; these keep the old classes. All:
  the whole network at the full rate, and nothing is kept, from weights and from scratch alike. All
  of them take the same number of steps. One-hot is run with head and full only.
- Metric: Dice of the new classes where a test scan shows them, on the scan's own grid. Scans that
  the weights of -m were trained on are left out of every split, by name, from their record.
- Statistic: differences on the same scans, with a bootstrap over seeds and scans.
- Paper: it claims that new classes can be added by their prompt; it gives no curve. How much of the
  old classes is forgotten is measured by continual.py.

Hardware. Real: one GPU; time not measured. Mini: two CPU cores, two
to three hours where two processes share the seeds (--seeds).
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lab import Lab, add_model, run_script
from plots import by_seed, curves
from runs import Arm, Run
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

from foundation import UsageError
from foundation.evaluation import Figure
from foundation.tuning import random_model

NEW = ("sacrum", "hip_left", "autochthon_left")
METHODS = ("head", "lora", "full", "continual", "all")
START, TEXT = ("weights", "scratch"), ("text", "one-hot")
# All of the network at the full rate, and no old class is protected: as from scratch, where there
# is nothing to keep. So "all" from weights differs from scratch in the weights alone.
ALL: Mapping[str, Any] = {
    "protect": "mask",
    "learning_rate": 3e-3,
    "backbone_rate": 1.0,
    "layer_decay": 1.0,
    "probe": 0,
}
PLANS = plans(
    mini={"methods": METHODS, "scans": [1, 2, 5, 10], "steps": 100, "probe": 300},
    smoke={"methods": ["full", "all"], "scans": [1], "steps": 2, "probe": 2},
    real={"methods": METHODS, "scans": [1, 2, 5, 10], "steps": 150, "probe": 360},
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add what it starts from, and the classes."""
    add_model(parser, "universal-ct")
    parser.add_argument("--classes", nargs="+", default=list(NEW), help="to be learnt")
    text = "numbers of training scans, in place of the plan's"
    parser.add_argument("--scans", nargs="+", type=int, metavar="N", help=text)


def wanted(arm: Arm, generated: bool) -> bool:
    """Tell whether an arm is run: not every combination answers a question of its own."""
    if arm["start"] == "scratch":
        return arm["embedding"] == "text" and arm["method"] == "all"
    if arm["embedding"] == "one-hot":
        return generated and arm["method"] in ("head", "full")
    return True


def counts(lab: Lab) -> list[int]:
    """Return the numbers of training scans."""
    return lab.given.scans or lab.plan.options["scans"]


def all_arms(lab: Lab) -> Iterator[Arm]:
    """Yield the arms of the experiment."""
    methods = lab.plan.options["methods"]
    axes = {"start": START, "embedding": TEXT, "method": methods, "scans": counts(lab)}
    return (arm for arm in lab.arms(axes) if wanted(arm, lab.generated))


def measure(run: Run, found: Structures) -> Iterable[Figure]:
    """Teach the new classes once, and measure them."""
    lab, arm, options = run.lab, run.arm, run.lab.plan.options
    names, count = lab.given.classes, int(arm["scans"])
    base = start_of(run, "one-hot" if arm["embedding"] == "one-hot" else "minilm", len(names))
    cases = list(islice(found.showing(names, run.seed or 0), count))
    if len(cases) < count:
        raise UsageError(f"Only {len(cases)} training scans show all of {', '.join(names)}.")
    method = str(arm["method"])
    settings = {key: options[key] for key in ("steps", "probe")}
    if method in ("head", "all"):  # of one part: nothing but what is new, or everything
        own = ALL if method == "all" else {}
        settings = {**own, "steps": sum(settings.values())}
    if arm["start"] == "scratch":
        base = random_model(base, (), run.seed or 0)
    settings |= {"validate_every": max(1, settings["steps"] // 4), "patience": 10**6}
    scans = few_scans(found, cases, names, run.folder / "scans")
    name = "full" if method == "all" else method
    model = learn(run, base, scans, names, name, settings)
    return figures_of(run.score(model, test_sets(lab, found, names), classes=names))


def main() -> None:
    """Run all arms, compare them, draw the curves."""
    lab = Lab.parse(__doc__, PLANS, add_arguments, axes=["scans"], prepares=False)
    found = open_structures(lab, [lab.given.model])
    weights, note = hashes_of(lab, lab.given.model), found.note
    for arm in all_arms(lab):
        used = weights if arm["start"] == "weights" else {}
        lab.measure(arm, partial(measure, found=found), weights=used, note=note)
    for scans in counts(lab):
        full = {"start": "weights", "embedding": "text", "method": "full", "scans": scans}
        every = {**full, "method": "all"}
        scratch, one_hot = {**every, "start": "scratch"}, {**full, "embedding": "one-hot"}
        few = f"with {scans} scan{'s' if scans > 1 else ''}"
        lab.verdict(f"Pretrained or from scratch, {few}?", every, scratch)
        lab.verdict(f"Pretrained with old classes kept, or from scratch, {few}?", full, scratch)
        if lab.generated:
            lab.verdict(f"Text or one-hot, {few}?", full, one_hot)
        for method in METHODS:
            if method != "full":
                lab.verdict(f"full or {method}, {few}?", full, {**full, "method": method})
    lab.finish([draw(lab)])


def draw(lab: Lab) -> Path:
    """Draw Dice against the number of training scans, a line for each way of learning."""
    lines: dict[str, dict[float, list[float]]] = {}
    for arm in all_arms(lab):
        way = ", ".join(str(arm[key]) for key in ("start", "embedding", "method"))
        lines.setdefault(way, {})[float(arm["scans"])] = by_seed(lab.records(), "dice/mean", arm)
    path, title = lab.output / "curves.png", "A class from its prompt"
    return curves(path, lines, "training scans", "mean Dice of the new classes", title, True)


if __name__ == "__main__":
    run_script(main)
