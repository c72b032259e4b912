"""Agreement of a model with the labels of one CT, class by class.

    python benchmarks/agreement.py CT LABELS [-m MODEL] [--json FILE] [--card CARD]

LABELS is a label map on the CT's grid with a `labels.json` beside it (value → name, of
TotalSegmentator or ours). Only classes that the labels know are compared. `--card` writes the
result into the model's card: its `model-index` and its section "Results". Against machine labels
the result is agreement, not accuracy.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from foundation import CLASSES, TOTALSEGMENTATOR, Card, Segmentation, from_pretrained
from foundation.evaluation import score_masks

# The organs of the development target; the mean over them is what runs are compared by.
TARGET = (
    "liver",
    "spleen",
    "kidney_right",
    "kidney_left",
    "urinary_bladder",
    "aorta",
    "colon",
)


def reference_masks(labels: Path) -> dict[str, np.ndarray]:
    """Read the masks of the classes that labels stand for.

    Args:
        labels: A label map (X, Y, Z), NIfTI, with `labels.json` beside it.

    Returns:
        Class name → mask (X, Y, Z), bool.
    """
    names = json.loads((labels.parent / "labels.json").read_text())
    label_map = np.asanyarray(nib.load(labels).dataobj)
    known = [each.name for each in CLASSES]
    values: dict[str, list[int]] = {}
    for value, label in names.items():
        name = TOTALSEGMENTATOR.get(label, label)
        if name in known:
            values.setdefault(name, []).append(int(value))
    return {name: np.isin(label_map, values[name]) for name in known if name in values}


def compare(segmentation: Segmentation, reference: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compare a segmentation with the masks of a reference.

    Args:
        segmentation: Of the CT.
        reference: Class name → mask (X, Y, Z) on the CT's grid.

    Returns:
        Class name → Dice (None where the reference is empty) and both volumes in millilitres.
    """
    ct = segmentation.volume
    both = {name: truth for name, truth in reference.items() if name in segmentation.classes}
    rows = score_masks("", segmentation.mask, both.items(), ct.spacing_mm)
    dice = {row.name: row.dice for row in rows}
    return {
        name: {
            "dice": dice.get(name),
            "volume_ml": round(segmentation.volumes_ml[name], 1),
            "reference_ml": round(float(truth.sum()) * ct.voxel_ml, 1),
        }
        for name, truth in both.items()
    }


def table(result: dict[str, Any]) -> str:
    """Write the result as Markdown."""
    lines = [
        f"{result['dataset']}. {result['reference']}. `{result['command']}`, {result['date']}, "
        f"{result['machine']}.",
        "",
        "| class | Dice | ml | ml in the labels |",
        "|-|-|-|-|",
    ]
    for name, row in result["classes"].items():
        score = "not in the labels" if row["dice"] is None else f"{row['dice']:.3f}"
        lines.append(f"| {name} | {score} | {row['volume_ml']:g} | {row['reference_ml']:g} |")
    lines.append("")
    if result["target_mean"] is not None:
        lines.append(f"Mean over {', '.join(TARGET)}: **{result['target_mean']:.3f}**.")
    lines += [f"Mean over all {result['present']} classes present: {result['mean']:.3f}."]
    return "\n".join(lines)


def write_card(path: Path, result: dict[str, Any]) -> None:
    """Put the result into a card: `model-index`, and the text below "## Results"."""
    card = Card.parse(path.stem, path.read_text(encoding="utf-8"), path.name)
    scores = {n: row["dice"] for n, row in result["classes"].items() if row["dice"] is not None}
    if result["target_mean"] is not None:
        scores["mean over " + ", ".join(TARGET)] = result["target_mean"]
    metrics = [
        {"type": "dice", "name": f"Dice agreement, {name}", "value": round(score, 3)}
        for name, score in scores.items()
    ]
    entry = {
        "task": {"type": "image-segmentation"},
        "dataset": {"type": "totalsegmentator", "name": result["dataset"]},
        "metrics": metrics,
    }
    index = [{"name": card.name, "results": [entry]}]
    before, heading, rest = card.text.partition("## Results\n")
    if not heading:
        raise SystemExit(f"{path} has no section '## Results'.")
    _, next_heading, after = rest.partition("\n## ")
    text = f"{before}{heading}\n{table(result)}\n{next_heading}{after}"
    updated = Card(card.name, {**card.metadata, "model-index": index}, text)
    path.write_text(updated.render(), encoding="utf-8")


def main() -> None:
    """Measure, print the table to stderr, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ct", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("-m", "--model", default="universal-ct")
    parser.add_argument("--dataset", help="name in the card; default: the folder of the CT")
    parser.add_argument("--reference", default="Against machine labels: agreement, not accuracy")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--card", type=Path)
    given = parser.parse_args()

    segmentation = from_pretrained(given.model).segment(given.ct)
    classes = compare(segmentation, reference_masks(given.labels))
    present = [row["dice"] for row in classes.values() if row["dice"] is not None]
    if not present:
        raise SystemExit(f"{given.labels} labels no class that {given.model} knows.")
    scores = {name: classes[name]["dice"] for name in TARGET if name in classes}
    target = [score for score in scores.values() if score is not None]
    result = {
        "model": given.model,
        "dataset": given.dataset or given.ct.parent.name,
        "reference": given.reference,
        "command": f"python benchmarks/agreement.py {given.ct.parent.name}/{given.ct.name} "
        f"{given.labels.parent.name}/{given.labels.name} -m {Path(given.model).name}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()} CPU",
        "classes": classes,
        "present": len(present),
        "mean": float(np.mean(present)),
        "target_mean": float(np.mean(target)) if target else None,
    }
    print(table(result), file=sys.stderr)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if given.card:
        write_card(given.card, result)


if __name__ == "__main__":
    main()
