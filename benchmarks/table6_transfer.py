"""Table 6: what pretrained weights are worth on TotalSegmentator's tasks, by number of scans.

    python benchmarks/table6_transfer.py --smoke
    python benchmarks/table6_transfer.py --mini
    python benchmarks/table6_transfer.py 15=DIR --start universal-ct-unet -o OUT     # real data
    … --tasks organs muscles --heads softmax --shots 64 1024 all

Protocol
- Data. Real: TotalSegmentator (15 for version 1, as published; 15_v2 for version 2), whose meta.csv
  gives the splits. Generated: 12 structures in scans of other bodies than the weights have seen.
- Tasks, by SuPreM (Li et al., ICLR 2024): organs, vertebrae, cardiac, muscles, ribs.
- Start: each --start (a name, folder or file of weights; only the backbone is kept, and for text
  the head), and the same architecture with random weights. Generated: trained on the ten partly
  labelled datasets of the world, once for each seed.
- Head. softmax: the published protocol, without text. text: the text-driven head, told the new
  classes by their prompts.
- Scans to learn from: nested, by seed. A class that none of them shows is part of the mean too.
- Training. Real: the published one, 200 epochs of one crop of each scan; the step that is best on
  the validation scans is kept. Mini: 300 steps at 2e-3 whatever the number of scans.
- Metric: Dice of each class where a test scan shows it, without background, on the scan's own grid;
  the mean over scans, then over classes. Masks are not cleaned up. Scans that any of the weights
  was trained on are left out of all splits and arms, by name, from their record.
- Statistic: differences on the same scans, with a bootstrap over seeds and scans.
- Paper: four means are known (grade 2), and that 94.43 is of the muscles (D); the rivals are
  unknown (U).

Hardware. Real: one GPU of 24 GB; each arm is a training of 200 epochs, time not measured. Mini: two
CPU cores, about half an hour.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from lab import Lab, run_script
from plots import by_seed, curves
from runs import Arm, Run
from sizes import plans
from structures import (
    Structures,
    hashes_of,
    open_structures,
    start_of,
    test_sets,
)
from verdicts import figures_of
from world import NEW_STRUCTURES

from foundation import UniversalModel, UsageError, choose_device, from_pretrained
from foundation.evaluation import Figure
from foundation.tuning import (
    HEADS,
    PUBLISHED,
    SIZES,
    TASKS,
    build_transfer,
    get_task,
    random_model,
    read_task,
    transfer_method,
    transfer_model,
    transfer_preprocessing,
)

WORLD, WEIGHTS, UNTRAINED, ALL = "structures", "weights", " untrained", "all"
PLANS = plans(
    mini={"shots": ["1", "5", ALL], "steps": 300, "rate": 2e-3, "voxels": 8192},
    smoke={"shots": ["1"], "steps": 2, "rate": 2e-3, "voxels": 512},
    real={"shots": [*map(str, SIZES), ALL], "rate": PUBLISHED.learning_rate},
)


def add_arguments(parser: ArgumentParser) -> None:
    """Add tasks, starts, heads and numbers of scans."""
    add = parser.add_argument
    add("--start", nargs="+", default=["universal-ct"], metavar="NAME", help="pretrained weights")
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="all by default")
    add("--heads", nargs="+", default=["softmax", "text"], choices=HEADS)
    add("--shots", nargs="+", metavar="N", help="numbers of training scans; 'all' for all")
    add("--patch", type=int, help="voxels along each axis, in place of the start's own")


def classes_of(task: str, version: int) -> tuple[str, ...]:
    """Return the structures of a task.

    Args:
        task: A name of `TASKS`, or the world's.
        version: Of TotalSegmentator.
    """
    return NEW_STRUCTURES if task == WORLD else get_task(task).in_version(version)  # type: ignore[arg-type]


def axes_of(lab: Lab, found: Structures) -> dict[str, Sequence[str]]:
    """Return what is varied, without numbers of scans that there are not enough for.

    Raises:
        UsageError: A number of scans is none.
    """
    starts = [WEIGHTS] if lab.generated else lab.given.start
    shots = lab.given.shots or lab.plan.options["shots"]
    if wrong := [text for text in shots if text != ALL and not (text.isdecimal() and int(text))]:
        raise UsageError(f"--shots {wrong[0]}: give numbers from 1 on, or {ALL}.")
    there = len(found.splits["train"])
    return {
        "task": [WORLD] if lab.generated else lab.given.tasks,
        "start": [name + ending for name in starts for ending in ("", UNTRAINED)],
        "head": lab.given.heads,
        "scans": [text for text in shots if text == ALL or int(text) <= there],
    }


def check_start(lab: Lab, name: str) -> dict[str, str]:
    """Return the hashes of weights to start from, before anything is trained.

    Raises:
        UsageError: They have no text-driven head: random weights of them cannot be drawn, and the
            text-driven arms have nothing to begin with.
    """
    if not lab.generated and not isinstance(from_pretrained(name), UniversalModel):
        raise UsageError(f"{name} has no text-driven head. Give weights that have one by --start.")
    return hashes_of(lab, name)


def start(run: Run) -> UniversalModel:
    """Load or train the weights of an arm, or draw random ones of their architecture."""
    named = str(run.arm["start"])
    name = named.removesuffix(UNTRAINED)
    model = start_of(run) if run.lab.generated else from_pretrained(name)
    return model if name == named else random_model(model, (), run.seed or 0)


def measure(run: Run, found: Structures) -> Iterable[Figure]:
    """Transfer to a task, and measure."""
    lab, arm, options = run.lab, run.arm, run.lab.plan.options
    classes, head = classes_of(str(arm["task"]), found.version), str(arm["head"])
    base = start(run)
    pre = transfer_preprocessing(base, patch_size=lab.given.patch)
    network = transfer_model(base, classes, head, preprocessing=pre, seed=run.seed or 0)
    # What is prepared depends on these alone; heads and starts share it.
    shared = arm["task"], arm["scans"], run.seed, f"{pre.spacing_mm[0]:g}mm"
    data = read_task(
        found.folder,
        classes,
        work=lab.output / "data" / "-".join(map(str, shared)),
        spacing_mm=pre.spacing_mm[0],
        shots=None if arm["scans"] == ALL else int(arm["scans"]),
        seed=run.seed or 0,
        without=found.left_out,
        progress=not lab.generated,
    )
    planned = options.get("steps") or PUBLISHED.epochs * len(data.train)
    method = transfer_method(
        head,
        pre,
        run.steps(planned),
        learning_rate=options["rate"],
        voxels=options.get("voxels"),
    )
    build_transfer(
        network,
        data,
        method,
        run.folder / "tuning",
        seed=run.seed or 0,
        device=choose_device("cpu" if run.cpu else "auto"),
        progress=not lab.generated,
    ).train()
    tests = test_sets(lab, found, classes)
    return figures_of(run.score(network.eval(), tests, classes=classes, postprocess=False))


def main() -> None:
    """Run all arms, compare them, draw the curves."""
    chosen = ("start", "tasks", "heads", "shots")
    lab = Lab.parse(__doc__, PLANS, add_arguments, axes=chosen, prepares=False)
    found = open_structures(lab, lab.given.start)
    axes = axes_of(lab, found)
    weights = {name: check_start(lab, name) for name in lab.given.start}
    for arm in lab.arms(axes):
        used = weights.get(str(arm["start"]), {})  # none where the weights are random
        lab.measure(arm, partial(measure, found=found), weights=used, note=found.note)
    for arm in lab.arms(axes):
        where = f"{arm['task']}, {arm['scans']} scans, {arm['head']}"
        if not str(arm["start"]).endswith(UNTRAINED):
            untrained = {**arm, "start": f"{arm['start']}{UNTRAINED}"}
            lab.verdict(f"Pretrained or from scratch ({where})?", arm, untrained)
            if arm["head"] == "text":
                lab.verdict(f"Text or softmax ({where})?", arm, {**arm, "head": "softmax"})
    lab.finish([curve(lab, found, axes, task) for task in axes["task"]])


def curve(lab: Lab, found: Structures, axes: dict[str, Sequence[str]], task: str) -> Path:
    """Draw Dice against the number of scans, a line for each start and head."""
    every = len(found.splits["train"])
    lines = {}
    for begin in axes["start"]:
        for head in axes["head"]:
            points = {}
            for scans in axes["scans"]:
                arm: Arm = {"task": task, "start": begin, "head": head, "scans": scans}
                place = float(every if scans == ALL else scans)
                points[place] = by_seed(lab.records(), "dice/mean", arm)
            lines[f"{begin}, {head}"] = points
    path = lab.output / f"{task}.png"
    return curves(path, lines, "training scans", "mean Dice", task, logarithmic=True)


if __name__ == "__main__":
    run_script(main)
