"""Scores of masks, of models on labelled scans, what a tuning changed of them, and reports.

scores = evaluate_dataset(model, get_dataset("06"), "3D-IRCADb", hd95=True)
scores.mean(["liver"]), scores.interval(["liver"], "nsd"), scores.write("scores.csv")

    metrics, calibration, detection   one mask, one map of probabilities, one patient
    intervals                         means, their intervals, differences of two arms
    scores                            rows by scan and class, and what is computed of them
    scoring                           a network on the scans of a store or of a dataset
    folders                           anyone's masks in files against anyone's labels
    changes, agreement                before and after a tuning
    report, comparison, charts, html  pages
"""

from foundation.evaluation.agreement import agreement
from foundation.evaluation.calibration import Calibration, calibration
from foundation.evaluation.changes import paired_difference
from foundation.evaluation.charts import Curve
from foundation.evaluation.comparison import write_comparison
from foundation.evaluation.detection import Detection, Finding, auc, find, summarise
from foundation.evaluation.folders import evaluate_masks
from foundation.evaluation.intervals import (
    Difference,
    bootstrap,
    bootstrap_ratio,
    paired_bootstrap,
    wilson,
)
from foundation.evaluation.metrics import (
    SurfaceDistances,
    dice,
    hausdorff_mm,
    surface_dice,
    surface_distances,
    volume_ml,
)
from foundation.evaluation.report import Report, write_report
from foundation.evaluation.scores import Score, Scores, score_masks
from foundation.evaluation.scoring import evaluate, evaluate_dataset, score_dataset, score_scan

__all__ = [
    "Calibration",
    "Curve",
    "Detection",
    "Difference",
    "Finding",
    "Report",
    "Score",
    "Scores",
    "SurfaceDistances",
    "agreement",
    "auc",
    "bootstrap",
    "bootstrap_ratio",
    "calibration",
    "dice",
    "evaluate",
    "evaluate_dataset",
    "evaluate_masks",
    "find",
    "hausdorff_mm",
    "paired_bootstrap",
    "paired_difference",
    "score_dataset",
    "score_masks",
    "score_scan",
    "summarise",
    "surface_dice",
    "surface_distances",
    "volume_ml",
    "wilson",
    "write_comparison",
    "write_report",
]
