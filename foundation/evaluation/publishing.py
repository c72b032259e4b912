"""The files that show results, as the records give them: Markdown, `model-index`, `.eval_results`.

Nothing in them is written by hand. `benchmarks/render.py` writes them or checks them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from foundation.errors import UsageError
from foundation.evaluation.labelled_ct import mean_title
from foundation.evaluation.records import Record, read_records
from foundation.evaluation.tables import read_table, render_blocks, render_table
from foundation.files import replacing
from foundation.hub.cards import Card
from foundation.hub.folder import EVAL_RESULTS, RECORDS
from foundation.settings import did_you_mean

TABLES = Path("benchmarks") / "tables"
CARDS = "model_cards"
# `model-index` and `.eval_results` name a data set by its family, as the card's `datasets` do.
_FAMILIES = {"totalsegmentator_example": "totalsegmentator", "lidc_idri_0001": "lidc-idri"}
_TITLES = {"dice": "Dice agreement"}


def rendered(root: str | os.PathLike[str]) -> dict[Path, str]:
    """Return what every file that shows results must hold, rendered from the records.

    Args:
        root: Of a checkout.

    Returns:
        Path → content: README.md, those of benchmarks/ and finetune/, every card, and the
        `.eval_results/*.yaml` of embedded weights.

    Raises:
        UsageError: A table is not right; the message names the file.
    """
    root = Path(root)
    texts = [root / "README.md", root / "benchmarks" / "README.md", root / "finetune" / "README.md"]
    files = {path: _blocks(root, path) for path in texts if path.is_file()}
    for path in sorted((root / CARDS).glob("*.md")):
        files[path] = _blocks(root, path)
        folder = root / "foundation" / "weights" / path.stem
        if path.stem != "README" and (folder / RECORDS).is_file():
            records = latest(read_records(folder / RECORDS))
            card = Card.parse(path.stem, files[path], str(path))
            index = [{"name": card.name, "results": model_index(records)}]
            files[path] = Card(
                card.name, {**card.metadata, "model-index": index}, card.text
            ).render()
            for record in records:
                content = yaml.safe_dump(eval_results(record), sort_keys=False, allow_unicode=True)
                files[folder / EVAL_RESULTS / f"{record.arm['dataset']}.yaml"] = content
    return files


def write_rendered(root: str | os.PathLike[str], check: bool = False) -> list[Path]:
    """Write the files that `rendered` gives, where they differ from it.

    Args:
        root: Of a checkout.
        check: Write nothing.

    Returns:
        The files that differed.
    """
    changed = []
    for path, content in rendered(root).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            changed.append(path)
            if not check:
                with replacing(path) as temporary:
                    temporary.write_text(content, encoding="utf-8")
    return changed


def latest(records: Sequence[Record]) -> list[Record]:
    """Return the last record of each data set, in the order of the first."""
    return list({str(record.arm.get("dataset")): record for record in records}.values())


def model_index(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the results of a `model-index`, as the Hub reads them: the Dice of every class.

    Args:
        records: Of a card. The arm of each has a `dataset`.
    """
    results = []
    for record in records:
        metrics = [
            {
                "type": "dice",
                "name": f"{_TITLES['dice']}, {mean_title(name, record.figures)}",
                "value": value,
            }
            for name, value in _dice(record).items()
        ]
        dataset = str(record.arm["dataset"])
        results.append(
            {
                "task": {"type": "image-segmentation"},
                "dataset": {"type": _FAMILIES.get(dataset, dataset), "name": dataset},
                "metrics": metrics,
            }
        )
    return results


def eval_results(record: Record) -> list[dict[str, Any]]:
    """Return the content of an `.eval_results/*.yaml`: the mean over the classes.

    The Hub shows it once its data set is registered there as a benchmark.

    Args:
        record: Of a card. Its arm has a `dataset`.

    Reference: https://huggingface.co/docs/hub/eval-results, by huggingface_hub's own writer.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    dataset = str(record.arm["dataset"])
    entry = EvalResultEntry(
        dataset_id=_FAMILIES.get(dataset, dataset),
        task_id=dataset,
        value=_dice(record)["mean"],
        date=record.date,
        notes=f"Dice, {mean_title('mean')}, {record.benchmark} with machine labels: no accuracy. "
        f"Weights: {record.arm.get('model', 'these')}. {record.command}",
    )
    entries: list[dict[str, Any]] = eval_result_entries_to_yaml([entry])
    return entries


def _dice(record: Record) -> dict[str, float]:
    """Class or mean → Dice, of those that have one."""
    return {
        figure.name.partition("/")[2]: round(figure.value, 4)
        for figure in record.figures
        if figure.name.startswith("dice/") and figure.value is not None
    }


def _blocks(root: Path, path: Path) -> str:
    names = {file.stem: file for file in sorted((root / TABLES).glob("*.yaml"))}

    def content(name: str) -> str:
        if name not in names:
            raise UsageError(
                f"{path}: no table is called {name!r}.{did_you_mean(name, names)} There are: "
                f"{', '.join(names)}. A table is a file {TABLES / '<name>.yaml'}."
            )
        try:
            return render_table(read_table(names[name]), root)
        except UsageError as error:
            raise UsageError(f"{names[name]}: {error}") from error

    return render_blocks(path.read_text(encoding="utf-8"), content, str(path))
