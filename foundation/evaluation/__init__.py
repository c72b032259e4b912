"""Scores of models on labelled scans, what a tuning changed of them, and reports.

scores = evaluate(model, cases, tolerance_mm=2.0)
scores.mean(["liver"]), scores.interval(["liver"], "nsd"), scores.write("scores.csv")
"""

from foundation.evaluation.agreement import agreement
from foundation.evaluation.charts import Curve
from foundation.evaluation.comparison import write_comparison
from foundation.evaluation.report import Report, write_report
from foundation.evaluation.scores import (
    Score,
    Scores,
    bootstrap,
    dice,
    evaluate,
    score_masks,
    surface_dice,
)

__all__ = [
    "Curve",
    "Report",
    "Score",
    "Scores",
    "agreement",
    "bootstrap",
    "dice",
    "evaluate",
    "score_masks",
    "surface_dice",
    "write_comparison",
    "write_report",
]
