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
    records, paper, tables            what runs gave, what the paper reports, Markdown of both
    publishing, reproduce             the files that show results; a card's figures run again
    labelled_ct                       a model on one CT that has labels
"""

from foundation.evaluation.agreement import (
    agreement,
)
from foundation.evaluation.calibration import (
    Calibration,
    calibration,
)
from foundation.evaluation.changes import (
    paired_difference,
)
from foundation.evaluation.charts import (
    Curve,
)
from foundation.evaluation.comparison import (
    write_comparison,
)
from foundation.evaluation.detection import (
    Detection,
    Finding,
    auc,
    find,
    summarise,
)
from foundation.evaluation.folders import (
    evaluate_masks,
)
from foundation.evaluation.intervals import (
    Difference,
    bootstrap,
    bootstrap_ratio,
    paired_bootstrap,
    wilson,
)
from foundation.evaluation.labelled_ct import (
    compare_with_reference,
    measure_ct,
    reference_of,
)
from foundation.evaluation.metrics import (
    SurfaceDistances,
    dice,
    hausdorff_mm,
    surface_dice,
    surface_distances,
    volume_ml,
)
from foundation.evaluation.paper import (
    PaperRow,
    PaperTable,
    paper,
)
from foundation.evaluation.publishing import (
    write_rendered,
)
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
from foundation.evaluation.report import (
    Report,
    write_report,
)
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
    score_masks,
)
from foundation.evaluation.scoring import (
    evaluate,
    evaluate_dataset,
    score_dataset,
    score_scan,
)
from foundation.evaluation.tables import (
    Table,
    read_table,
    render_blocks,
    render_records,
    render_table,
)
from foundation.files import (
    path_sha256,
)

__all__ = [
    "Calibration",
    "Curve",
    "Detection",
    "Difference",
    "Figure",
    "Finding",
    "PaperRow",
    "PaperTable",
    "Record",
    "Report",
    "Reproduction",
    "Score",
    "Scores",
    "SurfaceDistances",
    "Table",
    "add_record_option",
    "agreement",
    "append_record",
    "auc",
    "bootstrap",
    "bootstrap_ratio",
    "calibration",
    "command_line",
    "compare_with_reference",
    "describe_machine",
    "dice",
    "evaluate",
    "evaluate_dataset",
    "evaluate_masks",
    "find",
    "git_commit",
    "hausdorff_mm",
    "measure_ct",
    "measurement",
    "new_record",
    "paired_bootstrap",
    "paired_difference",
    "paper",
    "path_sha256",
    "read_records",
    "read_table",
    "reference_of",
    "renamed",
    "render_blocks",
    "render_records",
    "render_table",
    "reproduce",
    "score_dataset",
    "score_masks",
    "score_scan",
    "summarise",
    "surface_dice",
    "surface_distances",
    "versions",
    "volume_ml",
    "weights_sha256",
    "wilson",
    "write_comparison",
    "write_rendered",
    "write_report",
]
