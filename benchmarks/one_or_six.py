"""One universal network for six tasks, or one network for each: which segments better?

    python benchmarks/one_or_six.py --smoke
    python benchmarks/one_or_six.py --mini
    python benchmarks/one_or_six.py 10_03=MSD 10_06=MSD 10_07=MSD 10_08=MSD 10_09=MSD 10_10=MSD
                                    -o OUT                                  # real data

Protocol
- Data. Real: the six CT tasks of the Decathlon. Generated: six partly labelled datasets like them.
- Arms. One: a network with the classes of all tasks, trained on all six datasets by the masked
  loss. Six, as many steps each: a network for each task, with its classes and its dataset alone,
  and as many steps as the one network takes; so six times the training. Six, as many steps
  together: the same with a sixth of the steps.
- All have the same architecture, text-driven head, loss and batch. Only the last weights count.
- Test. Real: fold 0 of five, held out in all arms; a scan counts for the classes of its own task.
  Generated: 24 scans of other bodies, of which every class counts.
- Metric: Dice of each class where a scan shows it, on the scan's own grid; the mean over scans,
  then over classes.
- Statistic: differences on the same scans, with a bootstrap over seeds and scans. In the generated
  sizes over the large organs among the classes, as tumours are a few voxels at 8 mm.
- Paper: its Table 2 sets the universal model beside networks that were trained for one task each,
  by other architectures and schedules. What such networks cost is in figure7_efficiency.py.

Hardware. Real: 1 + 6 + 1 pretrainings' worth of steps; pretraining_cost.py projects their hours on
your machine. Mini: two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterable

from lab import Lab, run_script
from plots import bars, by_seed
from runs import Run
from sizes import plans
from tasks import CLASSES, TASKS, Task

from foundation import UsageError, get_dataset
from foundation.evaluation import Figure

ONE, EACH, TOGETHER = "one for all six", "six, as many steps each", "six, as many steps together"
LIKE = [task.generated for task in TASKS]


def tasks_of(lab: Lab) -> list[tuple[str, Task]]:
    """Return the tasks whose data are there, each with the id of its dataset.

    Raises:
        UsageError: There are fewer than two.
    """
    there = {get_dataset(name).id for name, _ in lab.data.training(LIKE)}
    wanted = [(task.generated if lab.generated else task.dataset, task) for task in TASKS]
    found = [(name, task) for name, task in wanted if name in there]
    if len(found) < 2:
        raise UsageError(f"Give two tasks at least, of {', '.join(t.dataset for t in TASKS)}.")
    return found


def measure(run: Run) -> Iterable[Figure]:
    """Train one network or six, and measure every task."""
    lab, kind = run.lab, str(run.arm["networks"])
    found = tasks_of(lab)
    lab.data.store(LIKE)
    for share in [found] if kind == ONE else [[each] for each in found]:
        datasets = [name for name, _ in share]
        classes = [name for _, task in share for name in task.classes]
        tests = lab.data.tests(fold=lab.data.fold)
        if not lab.generated:
            tests = [test for test in tests if get_dataset(test.dataset).id in datasets]
        if not tests:
            continue  # a tiny dataset has no scan in the fold
        model = run.pretrain(
            {"model.classes": [{"name": name} for name in classes]},
            like=LIKE,
            fold=lab.data.fold,
            name="+".join(datasets),
            only=datasets,
            share=len(found) if kind == TOGETHER else 1,
        )
        run.score(model, tests, classes=classes, name="+".join(datasets))
    return run.figures(lab.scores(run.arm, run.seed, "*"))


def main() -> None:
    """Run the three arms, compare them, draw the picture."""
    lab = Lab.parse(__doc__, plans())
    kinds = (ONE, EACH, TOGETHER)
    for arm in lab.arms({"networks": kinds}):
        lab.measure(arm, measure)
    for other in (EACH, TOGETHER):
        question = f"One universal network, or {other}?"
        lab.verdict(question, {"networks": ONE}, {"networks": other}, scores="*")
    groups = {
        name: {kind: by_seed(lab.records(), f"dice/{name}", {"networks": kind}) for kind in kinds}
        for name in ("mean", *CLASSES)
    }
    title = "One network for six tasks, or six"
    lab.finish([bars(lab.output / "dice.png", groups, "Dice", title)])


if __name__ == "__main__":
    run_script(main)
