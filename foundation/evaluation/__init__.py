"""Scores of models on labelled scans, what a tuning changed of them, and reports.

scores = evaluate(model, cases, tolerance_mm=2.0)
scores.mean(["liver"]), scores.interval(["liver"], "nsd"), scores.write("scores.csv")
"""

from foundation.evaluation.agreement import agreement
from foundation.evaluation.charts import Curve
from foundation.evaluation.comparison import write_comparison
from foundation.evaluation.labelled_ct import measure_ct, reference_masks
from foundation.evaluation.paper import PaperRow, PaperTable, paper
from foundation.evaluation.publishing import write_rendered
from foundation.evaluation.records import (
    Figure,
    Record,
    add_record_option,
    append_record,
    command_line,
    describe_machine,
    git_commit,
    new_record,
    read_records,
    versions,
)
from foundation.evaluation.report import Report, write_report
from foundation.evaluation.reproduce import (
    Reproduction,
    measurement,
    renamed,
    reproduce,
    weights_sha256,
)
from foundation.evaluation.scores import (
    Score,
    Scores,
    bootstrap,
    dice,
    evaluate,
    score_masks,
    surface_dice,
)
from foundation.evaluation.tables import (
    Table,
    read_table,
    render_blocks,
    render_records,
    render_table,
)
from foundation.files import path_sha256

__all__ = [
    "Curve",
    "Figure",
    "PaperRow",
    "PaperTable",
    "Record",
    "Report",
    "Reproduction",
    "Score",
    "Scores",
    "Table",
    "add_record_option",
    "agreement",
    "append_record",
    "bootstrap",
    "command_line",
    "describe_machine",
    "dice",
    "evaluate",
    "git_commit",
    "measure_ct",
    "measurement",
    "new_record",
    "paper",
    "path_sha256",
    "read_records",
    "read_table",
    "reference_masks",
    "renamed",
    "render_blocks",
    "render_records",
    "render_table",
    "reproduce",
    "score_masks",
    "surface_dice",
    "versions",
    "weights_sha256",
    "write_comparison",
    "write_rendered",
    "write_report",
]
