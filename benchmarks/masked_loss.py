"""Is it better to mask what a dataset does not label, or to take it for background?

    python benchmarks/masked_loss.py --smoke
    python benchmarks/masked_loss.py --mini
    python benchmarks/masked_loss.py 01=BTCV 04=LiTS 05=KiTS … -o OUT     # real data

Protocol
- Data. Real: the paper's datasets, as many as are given. Generated: ten partly labelled ones.
- Arms. masked: a class that a scan's dataset does not label has no part in the loss of that scan,
  as in the paper. background: the same scans, prepared once more with every class of all datasets
  declared as labelled, so that a voxel without a label of a class is a negative of it. That is what
  pooling the datasets without a mask does.
- Nothing else differs: network, samples, steps, seeds. There is no validation, since one of the
  arms would choose its weights by wrong labels; the last weights are measured.
- Test. Real: fold 0 of five, held out in both arms; only what its dataset labels is measured.
  Generated: 24 scans of other bodies, with all classes labelled.
- Metric: Dice of each class where a scan shows it, on the scan's own grid; the mean over scans,
  then over classes.
- Statistic: differences on the same scans, with a bootstrap over seeds and scans.
- Paper: it masks, and reports no comparison that is known to us (U).

Hardware. Real: each arm is one pretraining with the paper's settings, whose memory and hours
pretraining_cost.py tells on your machine; the paper had 8 × RTX A5000. The second store takes as
much disk as the first. Mini: two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from lab import Lab, run_script
from plots import bars, by_seed
from runs import Run
from sizes import plans

from foundation import get_dataset
from foundation.data import Case, Dataset
from foundation.evaluation import Figure

MASKED, BACKGROUND = "masked", "background"


def every_class(case: Case, dataset: Dataset) -> Case:
    """A rule of a dataset: all its classes are labelled in all its cases."""
    return replace(case, annotated=dataset.annotated)


def as_background(datasets: list[tuple[str, str]]) -> list[tuple[Dataset, str]]:
    """Declare every class of all datasets as labelled in each of them.

    Args:
        datasets: Pairs of a dataset and its folder.

    Returns:
        The same scans, of whose voxels none is unknown for want of an annotation.
    """
    found = [(get_dataset(name), root) for name, root in datasets]
    union = tuple(dict.fromkeys(name for dataset, _ in found for name in dataset.annotated))
    # The rule comes last: some datasets' own rules take classes out of single cases.
    return [
        (replace(each, annotated=union, rules=(*each.rules, every_class)), root)
        for each, root in found
    ]


def background_store(lab: Lab) -> Path:
    """Prepare the training data with all classes declared as labelled."""
    return lab.data.prepare(
        as_background(lab.data.training()), f"{lab.output.name}/store-background"
    )


def measure(run: Run) -> Iterable[Figure]:
    """Train with or without the mask and measure."""
    store = background_store(run.lab) if run.arm["unlabelled"] == BACKGROUND else None
    model = run.pretrain(fold=run.lab.data.fold, store=store)
    return run.figures(run.score(model, run.lab.data.tests(fold=run.lab.data.fold)))


def main() -> None:
    """Run both arms, compare them, draw the picture."""
    lab = Lab.parse(__doc__, plans())
    for arm in lab.arms({"unlabelled": [MASKED, BACKGROUND]}):
        lab.measure(arm, measure)
    lab.verdict(
        "Does the mask help against taking the unlabelled for background?",
        {"unlabelled": MASKED},
        {"unlabelled": BACKGROUND},
    )
    measured = [figure.name for record in lab.records()[:1] for figure in record.figures]
    groups = {
        name.removeprefix("dice/"): {
            arm: by_seed(lab.records(), name, {"unlabelled": arm}) for arm in (MASKED, BACKGROUND)
        }
        for name in measured
    }
    lab.finish([bars(lab.output / "dice.png", groups, "Dice", "Unlabelled classes")])


if __name__ == "__main__":
    run_script(main)
