"""Recipes: each says its command, can be tried by --smoke, and leaves a model or an adapter."""

import ast
import importlib.util
import json
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import REPOSITORY
from tiny import tiny_model
from tuning_trees import write_folders

from foundation.config import Preprocessing
from foundation.data.naming import NewClass
from foundation.hub.saved import save_pretrained
from foundation.model import UniversalModel
from foundation.synthesis import SMOKE_CLASS, generated_scan, write_scans
from foundation.text import MINILM
from foundation.tuning.data import read_data
from foundation.tuning.methods import METHODS
from foundation.tuning.recipe import settings_of

PACKAGE = REPOSITORY / "foundation"
RECIPES = sorted(path.stem for path in (REPOSITORY / "finetune").glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / f"finetune/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_method_has_its_recipe() -> None:
    assert {*METHODS, "encoder", "walkthrough"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_its_command_and_can_be_tried(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load(name)
    assert re.search(rf"^    python finetune/{name}\.py ", recipe.__doc__ or "", re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        recipe.main()
    assert ended.value.code == 0 and "--smoke" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_smoke(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--smoke"])
    monkeypatch.chdir(tmp_path)
    load(name).main()
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
    told = "".join(capsys.readouterr())
    assert tempfile.gettempdir() not in told, "what is removed is not shown"


# --- the four methods -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the prompt bank's encoder, on the grid of the scans, saved."""
    tiny = tiny_model()
    pre = Preprocessing(spacing_mm=(4.0,) * 3, patch_size=(16, 16, 16))
    config = replace(tiny.config, text=MINILM, preprocessing=pre)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = UniversalModel(config, torch.randn(3, MINILM.dim)).eval()
    return save_pretrained(network, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("scans"), cases=3)


@pytest.mark.parametrize(
    "name",
    [name if name == "head" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_a_recipe_reads_the_settings_of_its_method(
    name: str,
    model: Path,
    scans: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its options are the method's own, and it leaves what `add-class` leaves."""
    run = tmp_path / "run"
    line = [str(scans), "vertebra L1", "hip", "-o", str(run), "--model", str(model)]
    line += ["--device", "cpu", "--steps", "2", "--voxels", "2000", "--windows", "4", "--seed", "3"]
    line += [] if name == "head" else ["--probe", "2"]
    load(name).main(line)
    told = capsys.readouterr().err
    assert told.index("vertebra L1: nearest in text") < told.index("vertebra L1    ")
    saved = run / ("adapter" if name == "lora" else "model")
    assert f"Saved to {saved}; see {run / 'report.html'}." in told
    assert (saved / "README.md").is_file() and (run / "report.csv").is_file()
    state = json.loads((run / "tuning" / "last" / "state.json").read_text())["identity"]
    settings = {"steps": 2, "voxels": 2000} | ({} if name == "head" else {"probe": 2})
    expected = {"name": name, **asdict(METHODS[name](**settings, windows=4))}
    assert {key: expected[key] for key in state["method"]} == state["method"]


def modules_of(name: str) -> set[str]:
    """What a recipe imports of the package."""
    tree = ast.parse((REPOSITORY / f"finetune/{name}.py").read_text())
    froms = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {module for module in froms if module.startswith("foundation")}


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_is_short_and_uses_what_is_public(name: str) -> None:
    assert 40 <= len((REPOSITORY / f"finetune/{name}.py").read_text().splitlines()) <= 90
    assert modules_of(name) <= {"foundation", "foundation.tuning"}


@pytest.mark.parametrize("name", ["encoder", "synthesise", "totalsegmentator", "walkthrough"])
def test_a_longer_recipe_imports_from_the_package_and_its_rooms(name: str) -> None:
    rooms = {f"foundation.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    assert modules_of(name) <= {"foundation", *rooms}


def test_a_mistake_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load("head").main([str(tmp_path), "x", "-o", str(tmp_path / "run"), "--steps", "0"])
    assert ended.value.code == 2
    assert "error: steps is 0; it must be 1 or more." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load("full").main(["--smoke", "--protect", "hope"])
    assert "invalid choice: 'hope'" in capsys.readouterr().err


# --- what recipes share ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    data: Path
    classes: tuple[str, ...]
    output: Path
    test: Path | None = None
    learning_rate: float = 0.1
    steps: int = 5


def test_each_field_is_an_option() -> None:
    line = ["scans", "-o", "out", "a", "b c", "--learning-rate", "1e-3", "--test", "other"]
    with settings_of(Settings, "A recipe.", line, smoke={}) as settings:
        paths = Path("scans"), ("a", "b c"), Path("out"), Path("other")
        assert settings == Settings(*paths, learning_rate=1e-3)


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), settings_of(Settings, "", ["scans"], smoke={}):
        pass
    assert "give classes, output, or --smoke" in capsys.readouterr().err


def test_smoke_puts_generated_scans_in_place_of_the_data() -> None:
    line = ["--smoke", "--learning-rate", "2"]
    with settings_of(Settings, "", line, smoke={"steps": 2, "learning_rate": 1.0}) as settings:
        assert settings.classes == (SMOKE_CLASS,)
        assert (settings.steps, settings.learning_rate) == (2, 2.0)
        assert len(list(settings.data.iterdir())) == 3
    assert not settings.data.exists() and not settings.output.exists()


@pytest.mark.slow
def test_generated_scans_show_bone_that_can_be_learnt(tmp_path: Path) -> None:
    hu, labels = generated_scan(4)
    assert hu.shape == labels.shape == (64, 48, 48)
    bone, soft = hu[labels == 1], hu[labels == 4]
    assert bone.size > 500 and bone.mean() > soft.mean() + 50
    data = read_data(
        write_scans(tmp_path / "scans", 2), classes=[NewClass(SMOKE_CLASS)], workers=1,
        work=tmp_path / "work", spacing_mm=3.0, old_classes=("colon", "liver"), progress=False,
    )  # fmt: skip
    assert data.known == ("colon",)
    assert len(data.train) == len(data.validation) == 1
