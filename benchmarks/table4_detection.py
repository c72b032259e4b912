"""Table 4: tumours found or not, by patient and by lesion.

    python benchmarks/table4_detection.py --smoke
    python benchmarks/table4_detection.py --mini
    python benchmarks/table4_detection.py 04=LiTS 05=KiTS 10_07=MSD … -o OUT          # real data
    python benchmarks/table4_detection.py -m MODEL --test 04=LiTS well.yaml=WELL -o OUT

Protocol
- Data. Real: datasets that label a tumour. Patients known to be without it give the specificity:
  describe their scans in a YAML file that names the tumour in `annotated` and that no scan shows.
  Generated: training on ten partly labelled datasets, 24 test scans of which most show a lesion.
- Split. Real: --test, or fold 0 of five, which is held out. Generated: other bodies.
- Scans that the weights were trained on are left out by name; see table5_generalisation.py.
- A class of a scan counts where its dataset labels that class.
- Patient level: a patient is positive where the reference has a voxel of the class, and is called
  positive where the prediction has one, after post-processing at probability 0.5. The area under
  the ROC curve ranks patients by the highest probability of the class after post-processing.
- Lesion level: a lesion is a component of the reference (26 neighbours). It is found where the
  components of the prediction that touch it reach an IoU of 0.1 with it, taken together. Components
  that belong to no found lesion are false positives.
- Statistic: Wilson for sensitivity and specificity; DeLong on the logit scale for the area, which
  gives no interval at exactly 0 or 1; bootstrap over patients for lesions and false positives. A
  mean over classes has a bootstrap over patients. Where all drawn values are equal, no interval.
- Paper: sensitivity and specificity by patient, any predicted voxel being a positive. Its numbers,
  and its test data, are unknown (U).

Hardware. Real: one pretraining with the paper's settings; the paper had 8 × RTX A5000
(pretraining_cost.py projects the hours). With -m: none. Mini: two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from lab import Lab, add_model, run_script
from plots import bars, by_name
from runs import Run
from sizes import plans
from verdicts import figures_of

from foundation import CLASSES, UsageError, from_pretrained
from foundation.evaluation import Figure, Finding, bootstrap, summarise

LESIONS = tuple(each.name for each in CLASSES if each.name.endswith(("_tumor", "_cyst")))
SHOWN = ("sensitivity", "specificity", "auc", "lesion sensitivity")


def figures_of_class(name: str, findings: Sequence[Finding]) -> Iterator[Figure]:
    """Turn the findings of one class into figures with intervals.

    Args:
        name: Of the class.
        findings: One a patient.

    Yields:
        Sensitivity, specificity, area under the curve, by patient; sensitivity and false positives
        by lesion. `n` counts what the figure is a share of: patients with the class, patients
        without it, all patients, lesions, all patients.
    """
    found = summarise(findings)
    well = found.patients - found.positives
    rows = (
        ("sensitivity", found.sensitivity, found.sensitivity_interval, found.positives),
        ("specificity", found.specificity, found.specificity_interval, well),
        ("auc", found.auc, found.auc_interval, found.patients),
        (
            "lesion sensitivity",
            found.lesion_sensitivity,
            found.lesion_sensitivity_interval,
            found.lesions,
        ),
        (
            "false positives",
            found.false_positives_per_scan,
            found.false_positives_interval,
            found.patients,
        ),
    )
    for title, value, interval, count in rows:
        yield _figure(f"{title}/{name}", value, interval, count)


def means_over_classes(findings: Sequence[Finding]) -> Iterator[Figure]:
    """Average sensitivity and specificity over classes, with a bootstrap over patients."""
    names = list(dict.fromkeys(each.name for each in findings))
    cases = list(dict.fromkeys(each.case for each in findings))
    for title, present in (("sensitivity", True), ("specificity", False)):
        table = np.full((len(cases), len(names)), np.nan)
        for each in findings:
            if each.present == present:
                right = each.found == present
                table[cases.index(each.case), names.index(each.name)] = right
        shown = ~np.isnan(table).all(axis=0)
        value = float(np.nanmean(table[:, shown], axis=0).mean()) if shown.any() else None
        interval = bootstrap(table[:, shown]) if shown.any() else None
        count = int((~np.isnan(table)).any(axis=1).sum())
        yield _figure(title, value, interval, count)


def _figure(
    name: str, value: float | None, interval: tuple[float, float] | None, count: int
) -> Figure:
    # Drawn anew, equal values stay equal: an interval without width would claim certainty.
    low, high = interval if interval and interval[0] < interval[1] else (None, None)
    return Figure(name, value, low=low, high=high, n=count)


def measure(run: Run) -> Iterable[Figure]:
    """Train, or take the given model, and look for every lesion class that it has."""
    lab = run.lab
    weights = run.train(fold=lab.data.fold) if lab.model is None else lab.given.model
    model = lab.model or from_pretrained(weights)
    tests = [run.unseen(test, weights) for test in lab.data.tests(fold=lab.data.fold)]
    lesions = [name for name in LESIONS if name in model.config.class_names]
    scores = run.score(model, tests, classes=lesions, findings=lesions)
    yield from means_over_classes(scores.findings)
    for name in lesions:
        findings = [each for each in scores.findings if each.name == name]
        if findings:
            yield from figures_of_class(name, findings)
    yield from figures_of(scores)


def main() -> None:
    """Measure and draw every class."""
    lab = Lab.parse(__doc__, plans(mini_steps=2000), add_model)
    if lab.model is not None and not (lab.generated or lab.given.test):
        raise UsageError("Name the datasets to measure MODEL on: --test 04=DIR 05=DIR.")
    method = "Universal" if lab.model is None else lab.model.config.name
    for arm in lab.arms({"method": [method]}):
        lab.measure(arm, measure, seeds=None if lab.model is None else [None], weights=lab.weights)
    groups = by_name(lab.records(), LESIONS, SHOWN, {"method": method})
    lab.finish([bars(lab.output / "detection.png", groups, "share", "Detection of lesions")])


if __name__ == "__main__":
    run_script(main)
