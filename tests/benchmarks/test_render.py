"""What is published is what the records give, and no figure stands anywhere else."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from huggingface_hub import ModelCard, parse_eval_result_entries

from foundation.evaluation import read_records, read_table, render_blocks, write_rendered
from foundation.hub.cards import card_names, read_card
from foundation.hub.folder import EVAL_RESULTS, RECORDS

# TRAINING_LOG.md is left out: a log is prose of its day, which nobody renders anew.
TEXTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "benchmarks" / "README.md",
    REPOSITORY / "finetune" / "README.md",
    *sorted((REPOSITORY / "model_cards").glob("*.md")),
]
# A cell that begins with a decimal number or a percentage. Settings such as "3 mm", "2,500" or
# "1e-3, from step 5,600" are none, nor is a number within a sentence ("`unet`, 19.4 M").
FIGURE = re.compile(r"[*~≈+−-]*\d+(\.\d+|(\.\d+)?\s*%)")
EMBEDDED = [name for name in card_names() if (read_card(name).folder / RECORDS).is_file()]


def figures(markdown: str) -> Iterator[str]:
    """The cells of tables, outside of blocks and code, that hold a measured number."""
    prose = re.sub(r"```.*?```", "", render_blocks(markdown, lambda _: ""), flags=re.DOTALL)
    for line in prose.splitlines():
        if line.lstrip().startswith("|"):
            yield from (c.strip() for c in line.split("|") if FIGURE.match(c.strip()))


def test_the_repository_shows_what_the_records_give() -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "render.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run `python benchmarks/render.py`: {done.stderr}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_figure_stands_outside_of_a_block(path: Path) -> None:
    found = list(figures(path.read_text(encoding="utf-8")))
    assert not found, f"{path.name}: make records of {found} and render them"


@pytest.mark.parametrize(
    ("cell", "is_figure"),
    [
        ("0.913", True),
        ("**0.876**", True),
        ("−0.002", True),
        ("0.02 → 0.62", True),
        ("89 %", True),
        ("90.6%", True),
        ("3 mm", False),
        ("2,500", False),
        ("1e-3, from step 5,600 falling to 1.8e-4", False),
        ("`unet`, 19.4 M parameters", False),
        ("2026-11-26", False),
        ("", False),
    ],
)
def test_what_a_figure_is(cell: str, is_figure: bool) -> None:
    assert bool(list(figures(f"| a | {cell} |\n"))) == is_figure
    assert not list(figures(f"<!-- records: t -->\n| a | {cell} |\n<!-- end records -->\n"))


def test_every_table_is_shown_and_every_record_is_read() -> None:
    shown = {
        name
        for path in TEXTS
        for name in re.findall(r"^<!-- records: (\S+) -->$", path.read_text(encoding="utf-8"), re.M)
    }
    tables = {path.stem: path for path in (REPOSITORY / "benchmarks" / "tables").glob("*.yaml")}
    files = {name: read_table(path).records for name, path in tables.items()}
    # The table of an experiment waits for its first record.
    ready = {
        name for name, given in files.items() if all((REPOSITORY / f).is_file() for f in given)
    }
    assert shown == ready
    used = {name for given in files.values() for name in given}
    folder = REPOSITORY / "benchmarks" / "records"
    assert {f"benchmarks/records/{path.name}" for path in folder.glob("*.jsonl")} <= used


def test_a_record_names_no_path_of_a_machine() -> None:
    paths = [*(REPOSITORY / "benchmarks" / "records").glob("*.jsonl")]
    paths += [read_card(name).folder / RECORDS for name in EMBEDDED]
    for path in paths:
        for record in read_records(path):
            words = [record.command, record.note, *map(str, record.arm.values()), *record.data]
            assert not any(re.search(r"(^|[\s=\"'])/\w", word) for word in words), path.name
            assert record.commit or "transcribed" in record.note, path.name


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_hub_reads_the_results_of_a_card(name: str) -> None:
    card, folder = read_card(name), read_card(name).folder
    records = read_records(folder / RECORDS)
    datasets = {str(record.arm["dataset"]) for record in records}
    data = ModelCard(card.render(), ignore_metadata_errors=False).data
    assert {result.dataset_name for result in data.eval_results or []} == datasets
    last = {str(record.arm["dataset"]): record for record in records}
    for dataset, record in last.items():
        content = yaml.safe_load((folder / EVAL_RESULTS / f"{dataset}.yaml").read_text())
        (entry,) = parse_eval_result_entries(content)
        assert entry.value == pytest.approx(record.figure("dice/mean").value, abs=1e-4)
        assert entry.date == record.date


def checkout(tmp_path: Path) -> Path:
    for name in ("benchmarks", "finetune", "model_cards"):
        ignored = shutil.ignore_patterns("*.py", "*.ipynb", "*.png", "__pycache__")
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored)
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    for name in EMBEDDED:
        target = tmp_path / "foundation" / "weights" / name
        ignored = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(read_card(name).folder, target, ignore=ignored)
    return tmp_path


def test_a_changed_figure_reaches_every_place_and_only_by_rendering(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    assert write_rendered(root, check=True) == []
    path = root / "foundation" / "weights" / "universal-ct" / RECORDS
    text = path.read_text(encoding="utf-8")
    assert '"dice/liver", "value": 0.94}' in text
    path.write_text(text.replace('"dice/liver", "value": 0.94}', '"dice/liver", "value": 0.11}'))
    card = root / "model_cards" / "universal-ct.md"
    before = card.read_text(encoding="utf-8")
    assert write_rendered(root, check=True) == [card]
    assert card.read_text(encoding="utf-8") == before, "--check writes nothing"
    assert write_rendered(root) == [card]
    after = card.read_text(encoding="utf-8")
    assert "| liver | 0.110 |" in after and "value: 0.11\n" in after
    assert write_rendered(root, check=True) == []


def test_a_figure_that_was_edited_by_hand_is_found(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    path = root / "benchmarks" / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace("0.616", "0.916"), encoding="utf-8")
    assert write_rendered(root, check=True) == [path]
