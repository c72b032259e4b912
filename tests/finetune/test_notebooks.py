"""Notebooks: committed without outputs, over public names, and they run from top to bottom."""

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import nibabel as nib
import pytest
from conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "finetune").glob("*.ipynb"))
IDS = [path.stem for path in NOTEBOOKS]
FEW = {
    r"^STEPS = \d+": "STEPS = 2",
    r"^FAST = \{[^}]*\}": 'FAST = {"windows": 2, "voxels": 2048}',
    r"count=3": "count=2",
}


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **few: str) -> str:
    """Run a notebook in a folder, offline, and return what its cells printed.

    The kernel is a process of its own. It gets this one's environment, and the package from this
    checkout.
    """
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("IPYTHONDIR", str(folder / ".ipython"))
    book = read(REPOSITORY / f"finetune/{name}.ipynb")
    sources = [cell for cell in book.cells if cell.cell_type == "code"]
    for pattern, value in few.items():
        hits = 0
        for cell in sources:
            cell.source, count = re.subn(pattern, value, cell.source, flags=re.MULTILINE)
            hits += count
        assert hits == 1, f"{pattern} stands once in the notebook"
    client = nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    outputs = [output for cell in sources for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return "".join(
        output.get("text", "") + "".join(map(str, output.get("data", {}).values()))
        for output in outputs
    )


def test_there_are_two() -> None:
    assert IDS == ["add_a_class", "segment_and_look"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    book = read(path)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    assert book.metadata.kernelspec.name == "python3"
    assert book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith("# ")
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_a_notebook_uses_what_is_public(path: Path) -> None:
    code = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    modules = {node.module for node in imports if str(node.module).startswith("foundation")}
    assert modules and modules <= {"foundation", "foundation.synthesis", "foundation.tuning"}


@pytest.mark.slow
def test_segment_and_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = run("segment_and_look", tmp_path, monkeypatch)
    result = tmp_path / "look" / "result"
    names = {"segmentation.nii.gz", "volumes.csv", "preview.png", "segmentation.json"}
    assert {path.name for path in result.iterdir()} >= names
    sidecar = json.loads((result / "segmentation.json").read_text(encoding="utf-8"))
    assert sidecar["model"] == "universal-ct"
    labels = {label["name"]: label for label in sidecar["labels"].values()}
    assert set(labels) == {"liver", "spleen", "kidney_left", "kidney_right", "aorta"}
    assert 500 < labels["liver"]["volume_ml"] < 4000, "the phantom has a liver"
    mask: Any = nib.load(result / "segmentation.nii.gz")
    ct: Any = nib.load(tmp_path / "look" / "ct.nii.gz")
    assert mask.shape == ct.shape and (mask.affine == ct.affine).all()
    assert f"<td>{labels['liver']['volume_ml']:,.1f}</td>" in told
    assert "stride 32: (1, " in told


@pytest.mark.slow
def test_add_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = run("add_a_class", tmp_path, monkeypatch, **FEW)
    work = tmp_path / "sacrum"
    for method, saved in {"head": "model", "lora": "adapter"}.items():
        assert (work / method / "report.html").is_file()
        assert (work / method / "report.csv").read_text().count("\nsacrum,new,") == 1
        assert (work / method / saved / "README.md").is_file()
    sidecar = json.loads((work / "head-result" / "segmentation.json").read_text("utf-8"))
    assert "sacrum" in {label["name"] for label in sidecar["labels"].values()}
    adapter = json.loads((work / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert adapter["base_model_name_or_path"] == "universal-ct"
    size = (work / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < (work / "merged" / "model.safetensors").stat().st_size / 20
    assert "none is near" in told
    assert "on:  sacrum True 33 classes" in told and "off: None False 32 classes" in told
    assert "<iframe srcdoc=" in told
