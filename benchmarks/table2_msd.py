"""Table 2: six tasks of the Medical Segmentation Decathlon by one model, and their submission.

    python benchmarks/table2_msd.py --smoke
    python benchmarks/table2_msd.py --mini
    python benchmarks/table2_msd.py 10_03=MSD 10_06=MSD 10_07=MSD 10_08=MSD 10_09=MSD 10_10=MSD
                                    -o OUT                                  # cross-validation
    … -m MODEL --submit DIR                  # predictions for the challenge's test images

Protocol
- Data. Real: the training scans of the six CT tasks; other datasets may be given too and are
  trained on. MSD is the folder that holds Task03_Liver and the others. Generated: a partly labelled
  dataset of phantoms for each task; the spleen comes from "abdomen".
- Split: five folds of every dataset, one file for all trainings. Each scan is measured once, by the
  model that has not seen it. Scans that MSD liver shares with LiTS are in one fold.
- Network: one universal model for all tasks of a fold. The last weights are measured; see
  table3_btcv.py for the reason.
- Metrics on the scan's own grid: Dice; surface Dice with a tolerance of 2 mm (generated: a voxel).
  The server's tolerances by class are unknown, so its NSD is not comparable with ours.
- Statistic: intervals by a bootstrap over scans; for several seeds, mean and standard deviation.
- Paper: Dice and NSD of the challenge's hidden test scans (grade E). Ours are of the training scans
  by cross-validation. These are other scans, so the numbers cannot be compared with the paper's.
  Only `--submit` and the challenge's server give the paper's measurement.
- The submission: DIR/Task03_Liver/liver_N.nii.gz for each image that the task's dataset.json lists
  under "test"; uint8 with the values of its "labels", on the image's own grid.

Hardware. Real: five pretrainings with the paper's settings; the paper had 8 × RTX A5000;
pretraining_cost.py projects the hours. Mini: two CPU cores.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab import Lab, add_model, run_script
from plots import bars, by_name
from runs import Run
from sizes import plans
from tasks import CLASSES, TASKS
from verdicts import figures_of

from foundation import UsageError, get_dataset
from foundation.data import Dataset
from foundation.evaluation import Figure
from foundation.imaging import write_label_map

ARM = {"method": "Universal"}


def add_arguments(parser: ArgumentParser) -> None:
    """Add those of the submission."""
    add_model(parser)
    parser.add_argument("--submit", type=Path, metavar="DIR", help="write a submission, no table")


def measure(run: Run) -> Iterable[Figure]:
    """Train five models and measure each on its fold."""
    generated = run.lab.generated
    classes = {task.generated if generated else task.dataset: task.classes for task in TASKS}
    like = list(classes) if generated else None
    scores = run.cross_validate(classes, like=like, tolerance_mm=run.lab.data.tolerance_mm)
    return [*figures_of(scores), *figures_of(scores, metric="nsd")]


# --- the submission -------------------------------------------------------------------------------


def read_task(dataset: Dataset, root: str | Path) -> tuple[Path, list[Path]]:
    """Find the folder of a task and its test images.

    Args:
        dataset: Of the Decathlon.
        root: Its folder, or the one around it.

    Returns:
        The task's folder, and the images that its dataset.json lists under "test".

    Raises:
        UsageError: An image is not there, or the labels are others than ours.
    """
    first = dataset.find(root)[0].image
    assert first is not None
    task = first.parents[1]
    content: dict[str, Any] = json.loads((task / "dataset.json").read_text(encoding="utf-8"))
    given = {int(value) for value in content.get("labels", {})} - {0}
    if given and given != {int(value) for value in dataset.label_map}:
        raise UsageError(
            f"{task / 'dataset.json'} has the labels {sorted(given)}; {dataset.name} has "
            f"{', '.join(map(str, dataset.label_map))}. Is it another release?"
        )
    # Some releases list files as {"image": …}, others as plain text.
    listed = [e["image"] if isinstance(e, dict) else e for e in content.get("test", [])]
    images = [task / each for each in listed]
    if lost := [str(path) for path in images if not path.is_file()]:
        raise UsageError(f"{len(lost)} test images of {task} are not there, such as {lost[0]}.")
    if not images:
        raise UsageError(f"{task / 'dataset.json'} lists no test images.")
    return task, images


def submit(
    model: Any, dataset: Dataset, root: str | Path, target: Path, **options: Any
) -> Iterator[Path]:
    """Segment the test images of a task, in the challenge's format.

    Args:
        model: That has the classes of the task.
        dataset: Of the Decathlon.
        root: See `read_task`.
        target: Receives a folder for the task; files that are there are left alone.
        **options: As of `model.segment`.

    Yields:
        Each file, when it is there.
    """
    task, images = read_task(dataset, root)
    values = {names[-1]: int(value) for value, names in dataset.label_map.items()}
    for image in images:
        path = target / task.name / image.name
        if not path.is_file():
            found = model.segment(image, classes=list(values), **options)
            labels = replace(found, label_values=values).label_map()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_label_map(path, labels, found.volume)
        yield path


def write_submission(lab: Lab) -> None:
    """Write the predictions of all tasks that are given."""
    if lab.model is None:
        raise UsageError("--submit needs -m MODEL, trained on all labelled scans of the tasks.")
    options = {"device": "auto", "progress": False}
    pairs = [(get_dataset(name), root) for name, root in lab.data.training()]
    for dataset, root in pairs:
        if dataset.id in {task.dataset for task in TASKS}:
            files = list(submit(lab.model, dataset, root, lab.given.submit, **options))
            print(f"{dataset.name}: {len(files)} predictions", file=sys.stderr)
    print(f"{lab.given.submit}: zip its folders and upload them to the challenge.")


def main() -> None:
    """Run the folds and draw the tasks; or write a submission."""
    own = ("submit", "model")  # of the submission, which records nothing
    lab = Lab.parse(__doc__, plans(mini_steps=1000), add_arguments, axes=own)
    if lab.given.submit:
        return write_submission(lab)
    for arm in lab.arms({key: [value] for key, value in ARM.items()}):
        lab.measure(arm, measure)
    groups = by_name(lab.records(), ("mean", *CLASSES), ("dice", "nsd"), ARM)
    label, title = "Dice and surface Dice", "Six tasks of MSD"
    lab.finish([bars(lab.output / "tasks.png", groups, label, title)])


if __name__ == "__main__":
    run_script(main)
