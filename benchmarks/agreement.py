"""Agreement of a model with the labels of one CT, class by class.

    python benchmarks/agreement.py CT LABELS [-m MODEL] [--also LABEL=CLASS] [--record FILE]
        [--card]

LABELS is a label map on the CT's grid with a `labels.json` beside it (value → name, of
TotalSegmentator or ours). Only classes that the labels know are compared. `--record` appends the
record to a file; `--card` to the records beside the weights, from which the model's card is then
rendered. `universal-ct reproduce` runs these again. Against machine labels the result is agreement,
not accuracy. It takes seconds for each CT.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from foundation import from_pretrained, list_models
from foundation.evaluation import (
    Table,
    add_record_option,
    append_record,
    command_line,
    measure_ct,
    new_record,
    path_sha256,
    renamed,
    render_records,
    weights_sha256,
    write_rendered,
)

ROOT = Path(__file__).resolve().parents[1]
TABLE = Table(
    "classes",
    {
        "class": "{*}",
        "Dice": "{dice/*:3}",
        "ml": "{volume/*:1}",
        "ml in the labels": "{reference/*:1}",
    },
    skip=("mean", "target"),
    none="not in the labels",
    after="Mean over all classes present: {dice/mean:3}.",
)


def main() -> None:
    """Measure, print the table to stderr, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ct", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("-m", "--model", default="universal-ct")
    parser.add_argument("--dataset", help="name in the card; default: the folder of the CT")
    parser.add_argument("--also", default="", metavar="LABEL=CLASS", help="other names of labels")
    parser.add_argument("--card", action="store_true", help="a record of the model's card")
    add_record_option(parser)
    given = parser.parse_args()
    names = {model.name for model in list_models() if model.where == "embedded"}
    if given.card and given.model not in names:
        parser.error(f"--card is for embedded weights ({', '.join(sorted(names))}); use --record.")

    model = from_pretrained(given.model)
    start = time.perf_counter()
    figures = measure_ct(model, given.ct, given.labels, renamed(given.also))
    files = (given.ct, given.labels, given.labels.parent / "labels.json")
    name_of = {path: f"{path.resolve().parent.name}/{path.name}" for path in files}
    arm = {
        "model": given.model if given.model in names else Path(given.model).name,
        "dataset": given.dataset or given.ct.resolve().parent.name,
        "ct": name_of[given.ct],
        "labels": name_of[given.labels],
    }
    record = new_record(
        "agreement",
        "real",
        arm={**arm, "also": given.also} if given.also else arm,
        figures=figures,
        seconds=time.perf_counter() - start,
        data={name: path_sha256(path) for path, name in name_of.items()},
        weights=weights_sha256(model),
        command=command_line([word for word in sys.argv if word != "--card"]),
    )
    print(render_records(TABLE, [record]), file=sys.stderr)
    if given.record:
        append_record(given.record, record)
    if given.card:
        append_record(ROOT / "foundation" / "weights" / given.model / "records.jsonl", record)
        write_rendered(ROOT)


if __name__ == "__main__":
    main()
