"""Model folders, checkpoints and stores from anybody, as a user of the command line meets them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import foundation
from foundation.files import file_sha256

try:
    from foundation.cli.main import main
except ImportError:  # a checkout of an older version
    from foundation.cli import main  # type: ignore[attr-defined,no-redef]

EMBEDDED = Path(foundation.__file__).parent / "weights" / "universal-ct"
CONFIG, WEIGHTS, PROMPTS = "config.json", "model.safetensors", "prompt_embedding.safetensors"
NAN = float("nan")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model, in a folder of its own."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "model"))


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    hu = np.random.default_rng(0).normal(0, 60, (24, 24, 24))
    hu[:4] = -1000
    nib.save(nib.Nifti1Image(hu.astype(np.int16), np.diag([3.0] * 3 + [1.0])), tmp_path / "ct.nii")
    return tmp_path / "ct.nii"


def resum(folder: Path) -> None:
    """Right sums, so that only the content is wrong."""
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in (CONFIG, WEIGHTS, PROMPTS)]
    (folder / "SHA256SUMS").write_text("".join(lines))


def refused(folder: Path, ct: Path, capsys: pytest.CaptureFixture[str], *said: str) -> None:
    """`segment` ends with 1, says what is wrong in a line, and writes nothing."""
    resum(folder)
    before = sorted(path.name for path in ct.parent.iterdir())
    out = ct.parent / "out"
    assert main(["segment", str(ct), "-o", str(out), "-m", str(folder), "-q"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") or ": error: " in message
    for text in said:
        assert text in message
    assert sorted(path.name for path in ct.parent.iterdir()) == before


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        for name, value in changes.items():
            if name in values["preprocessing"]:
                values["preprocessing"][name] = value
            else:
                values[name] = value
        (folder / CONFIG).write_text(json.dumps(values))

    return apply


def prompts(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / PROMPTS, framework="pt") as file:
        rows, metadata = file.get_tensor("prompt_embedding"), file.metadata()
    rows[0, 0] = NAN
    save_file({"prompt_embedding": rows}, folder / PROMPTS, metadata=metadata)


def one_nan(state: dict[str, Any]) -> None:
    state["head.controller.bias"][0] = NAN


def all_int8(state: dict[str, Any]) -> None:
    state.update({name: value.to(torch.int8) for name, value in state.items()})


CASES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a weight is NaN": (tensors(one_nan), ("NaN", "head.controller.bias")),
    "weights are int8": (tensors(all_int8), ("int8",)),
    "a prompt is NaN": (prompts, ("NaN", PROMPTS)),
    "huge widths": (config(backbone_options={"widths": [10**9] * 5}), ("8192",)),
    "many widths": (config(backbone_options={"widths": [16] * 100_000}), ("1000 values",)),
    "negative widths": (config(backbone_options={"widths": [-16] * 5}), ("builds no model",)),
    "a huge branch": (
        config(branches=[{"classes": ["liver"], "kind": "side", "width": 10**9, "replaces": True}]),
        ("8192",),
    ),
    "options are a list": (config(backbone_options=[1]), ("backbone_options",)),
    "options are null": (config(backbone_options=None), ("backbone_options",)),
    "the backbone is a list": (config(backbone=["unet"]), ("backbone",)),
    "no text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe"), ("as text",)),
    "brackets": (lambda folder: (folder / CONFIG).write_text("[" * 100_000), ("JSON",)),
    "digits": (lambda folder: (folder / CONFIG).write_text("1" * 5000), ("JSON",)),
    "spacing 1e-9": (config(spacing_mm=[1e-9] * 3), ("spacing_mm",)),
    "spacing NaN": (config(spacing_mm=[NAN] * 3), ("spacing_mm",)),
    "two spacings": (config(spacing_mm=[1.5, 1.5]), ("spacing_mm",)),
    "patch 1e9": (config(patch_size=[10**9] * 3), ("patch_size",)),
    "patch 16.5": (config(patch_size=[16.5] * 3), ("patch_size",)),
    "two patches": (config(patch_size=[96, 96]), ("patch_size",)),
    "HU NaN": (config(hu_windows=[[NAN, 250], [-1000, 1000]]), ("hu_windows",)),
    "HU in wrong order": (config(hu_windows=[[250, -175], [-1000, 1000]]), ("hu_windows",)),
    "overlap 0.9999999": (config(overlap=0.9999999), ("overlap",)),
    "format_version true": (config(format_version=True), ("format_version",)),
}


@pytest.mark.parametrize("what", CASES)
def test_a_folder_that_lies_is_refused(
    what: str, folder: Path, ct: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = CASES[what]
    change(folder)
    refused(folder, ct, capsys, *said)


@pytest.mark.parametrize(
    "changes",
    [{"name": 5}, {"name": ""}, {"name": "spleen"}, {"parent": "arm"}, {"parent": "liver"}],
)
def test_a_class_that_is_none_is_refused(
    changes: dict[str, Any], folder: Path, ct: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((folder / CONFIG).read_text())
    liver = next(each for each in values["classes"] if each["name"] == "liver")
    liver.update(changes)
    (folder / CONFIG).write_text(json.dumps(values))
    refused(folder, ct, capsys)


def test_sums_that_are_no_text_are_refused(
    folder: Path, ct: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe")
    assert main(["segment", str(ct), "-o", str(ct.parent / "o"), "-m", str(folder), "-q"]) == 1
    assert "error: " in capsys.readouterr().err


def test_a_checkpoint_with_keys_that_are_no_text_is_refused(
    ct: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({0: torch.zeros(1)}, ct.parent / "w.pth")
    given = ["-o", str(ct.parent / "o"), "-m", str(ct.parent / "w.pth"), "-q"]
    assert main(["segment", str(ct), *given]) == 1
    assert "error: " in capsys.readouterr().err


def test_a_card_of_aliases_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 6)]
    (folder / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")
    assert main(["info", str(folder), "--json"]) == 1
    shown = capsys.readouterr()
    assert "error: " in shown.err and not shown.out


def test_a_notice_does_not_steer_the_terminal(
    folder: Path, ct: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(licence_notice="\x1b[2J\x1b]0;owned\x07")(folder)
    resum(folder)
    main(["segment", str(ct), "-o", str(ct.parent / "o"), "-m", str(folder), "-c", "liver"])
    shown = capsys.readouterr()
    assert "owned" in shown.err and "\x1b[2J" not in shown.err and "\x07" not in shown.err
