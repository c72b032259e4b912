"""The built wheel holds everything: weights, cards, prompt bank; tried outside the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.slow

SCRIPT = """
import json, socket, sys
import numpy as np

def refuse(*_): raise OSError("no network in this test")
socket.socket.connect = refuse

import foundation
from foundation import from_pretrained, list_models, model_card, segment

ct = np.full((40, 36, 32), -1000, dtype=np.int16)
ct[6:34, 6:30, :] = 40
result = segment((ct, np.diag([3.0, 3.0, 3.0, 1.0])), classes=["liver", "spleen"])
print(json.dumps({
    "file": foundation.__file__,
    "models": [model.name for model in list_models()],
    "card": model_card("universal-ct").name,
    "classes": list(from_pretrained("universal-ct").classes),
    "volumes_ml": dict(result.volumes_ml),
    "mask_shape": list(result.mask("liver").shape),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as an index would get it."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(REPOSITORY)])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with the wheel alone, which borrows the dependencies of this one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True, symlinks=os.name != "nt")
    binaries = home / ("Scripts" if os.name == "nt" else "bin")
    pip = [str(binaries / "python"), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    run([*pip, str(wheel)])
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run([str(binaries / "python"), "-c", ask]).strip())
    # A path in a .pth file does not run that folder's own .pth files, so an editable
    # installation of this checkout there stays out.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "zz_dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")
    return binaries


def run(command: list[str], **options: object) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=clean, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def test_weights_cards_and_licence_are_inside(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    weights = {"config.json", "model.safetensors", "prompt_embedding.safetensors", "SHA256SUMS"}
    assert {f"foundation/weights/universal-ct/{name}" for name in weights} <= names
    cards = {f"foundation/model_cards/{card.name}" for card in REPOSITORY.glob("model_cards/*.md")}
    assert len(cards) >= 3 and cards <= names
    assert "foundation/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    data = [path for path in (REPOSITORY / "foundation" / "data").rglob("*") if path.is_file()]
    assert {path.relative_to(REPOSITORY).as_posix() for path in data} <= names
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/", "runs/"))}


def test_the_installed_wheel_segments(installed: Path, tmp_path: Path) -> None:
    stdout = run([str(installed / "python"), "-I", "-c", SCRIPT], cwd=tmp_path)
    told = json.loads(stdout.splitlines()[-1])
    assert Path(told["file"]).is_relative_to(installed.parent), "not the checkout"
    assert told["card"] == "universal-ct"
    assert set(told["models"]) == {"universal-ct", "universal-ct-swin-unetr", "universal-ct-unet"}
    assert len(told["classes"]) == 32
    assert set(told["volumes_ml"]) == {"liver", "spleen"}
    assert told["mask_shape"] == [40, 36, 32]


def test_the_installed_command_lists_models(installed: Path, tmp_path: Path) -> None:
    stdout = run([str(installed / "universal-ct"), "models"], cwd=tmp_path)
    assert "universal-ct-swin-unetr" in stdout
