"""Table 5: scans of other hospitals, without adaptation, organ by organ.

    python benchmarks/table5_generalisation.py --smoke
    python benchmarks/table5_generalisation.py --mini [--rendered OPEN_DATA]
    python benchmarks/table5_generalisation.py -m MODEL --test 06=3D-IRCADb 15=TotalSegmentator
                                               -o OUT                      # real data
    … 01=BTCV 04=LiTS … --test 06=3D-IRCADb        # train first, in place of -m

Protocol
- Data. Real: all scans of 3D-IRCADb and of TotalSegmentator v1, with MODEL, or with one that is
  trained on the datasets given. Generated: training on ten partly labelled datasets; measured on
  "test" and "external", which are other phantoms of one origin, and with --rendered on label maps
  of four people, rendered anew: bodies of another origin.
- Nothing is adapted, no threshold is tuned. All classes that both sides know are measured. Where
  labels merge two sides, the union of both is. TotalSegmentator's colon holds the rectum.
- Scans that the weights were trained on are left out by name, from the record of the weights'
  training data. Without such a record nothing can be, and the record of the run says so. Scans that
  were published under several names cannot be told: look yourself whether a training set took in
  3D-IRCADb.
- Metrics on the scan's own grid: Dice; surface Dice with a tolerance of 2 mm (generated: a voxel);
  the 95th percentile of the surface distance, without organs that were missed. The mean over scans
  that show an organ, then over organs.
- Statistic: intervals by a bootstrap over scans. Rendered scans of one person are not independent,
  so their intervals are too narrow.
- TotalSegmentator's labels are machine-made in part: agreement, not accuracy.
- Paper: its numbers are unknown (U).

Hardware. Real: the time of a scan was not measured on a GPU. A training before it had 8 × RTX A5000
in the paper; pretraining_cost.py projects its hours. Mini: two CPU cores.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from experiment_data import TestSet
from lab import Lab, add_model, run_script
from plots import bars, by_seed
from runs import Run
from sizes import plans
from verdicts import figures_of
from world import SCALES, render_external

from foundation import UsageError, from_pretrained, get_dataset
from foundation.evaluation import Figure, path_sha256


def add_arguments(parser: ArgumentParser) -> None:
    """Add the model, and the open label maps."""
    add_model(parser)
    text = "also measure on these label maps, rendered anew (mini); see data/open-data.yaml"
    parser.add_argument("--rendered", type=Path, metavar="OPEN_DATA", help=text)


def sets_to_measure(lab: Lab) -> dict[str, TestSet]:
    """Return what is measured on: id of a dataset → its scans."""
    if not (lab.generated or lab.given.test):
        raise UsageError("Name the datasets to measure on: --test 06=DIR 15=DIR.")
    sets = lab.data.tests(["test", "external"])
    found = {get_dataset(each.dataset).id: each for each in sets}
    if lab.given.rendered and not lab.generated:
        raise UsageError("--rendered is for --mini and --smoke; give real scans by --test.")
    if lab.given.rendered and lab.model is not None:
        raise UsageError(
            "--rendered with -m: MODEL may have been trained on these bodies, which cannot be told "
            "from anew rendered scans. Leave one of them out."
        )
    if lab.given.rendered and not lab.given.rendered.is_dir():
        print(
            f"{lab.given.rendered} is no folder: nothing is rendered. Its files are listed in "
            "model_cards/universal-ct.manifest.json.",
            file=sys.stderr,
        )
    elif lab.given.rendered:
        world = lab.data.world
        count = SCALES[world.size].counts["external"]
        folder = lab.output / "rendered"
        pair = render_external(folder, lab.given.rendered, world.spacing_mm, count)
        found["rendered"] = TestSet(*pair)
        lab.data.hashes[f"rendered-{lab.size}"] = path_sha256(folder / "rendered")
    return found


def measure(run: Run, test: TestSet) -> Iterable[Figure]:
    """Measure the given model, or one that is trained once for all test sets of a seed."""
    lab = run.lab
    model, weights = lab.model, lab.given.model
    if model is None:
        once = Run(lab, {"method": run.arm["method"]}, run.seed, run.notes)
        weights = once.train(fold=lab.data.fold)
        model = from_pretrained(weights)
    test = run.unseen(test, weights)
    scores = run.score(model, [test], tolerance_mm=lab.data.tolerance_mm, hd95=True)
    yield Figure("scans", len(scores.cases))
    for metric in ("dice", "nsd", "hd95_mm"):
        yield from figures_of(scores, metric=metric)


def main() -> None:
    """Measure on every test set, draw the organs."""
    lab = Lab.parse(__doc__, plans(mini_steps=2000), add_arguments)
    sets = sets_to_measure(lab)
    method = "Universal" if lab.model is None else lab.model.config.name
    for arm in lab.arms({"method": [method], "test": list(sets)}):
        function = partial(measure, test=sets[str(arm["test"])])
        seeds = None if lab.model is None else [None]
        lab.measure(arm, function, seeds=seeds, weights=lab.weights)
    records = lab.records()
    names = [f.name for r in records for f in r.figures if f.name.startswith("dice/")]
    groups = {
        name.removeprefix("dice/"): {
            test: by_seed(records, name, {"method": method, "test": test}) for test in sets
        }
        for name in dict.fromkeys(names)
    }
    lab.finish([bars(lab.output / "organs.png", groups, "Dice", "Other hospitals, no adaptation")])


if __name__ == "__main__":
    run_script(main)
