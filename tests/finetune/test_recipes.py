"""Recipes: each says its command, runs by --smoke, and does what the package's method does."""

import importlib.util
import itertools
import re
import sys
from dataclasses import dataclass, fields, replace
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
from foundation.tuning import setup
from foundation.tuning.data import read_data
from foundation.tuning.feeds import CachedFeed
from foundation.tuning.finetune import finetune
from foundation.tuning.methods import METHODS
from foundation.tuning.recipe import settings_of

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
def test_smoke(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--smoke"])
    monkeypatch.chdir(tmp_path)
    load(name).main()
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


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


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_those_of_the_method(name: str) -> None:
    method = METHODS[name]
    for field in fields(load(name).Settings):
        if hasattr(method, field.name):
            assert field.default == getattr(method, field.name), field.name


@pytest.mark.parametrize(
    "name",
    [name if name == "head" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_a_recipe_gives_the_very_weights_of_its_method(
    name: str,
    model: Path,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, scores = load(name), itertools.count(1)
    # A few steps teach nothing: without a rising score the untrained weights would be compared.
    monkeypatch.setattr(CachedFeed, "dice", lambda self, windows: {"any": next(scores) / 100})
    for module in (recipe, setup):
        better = lambda totals, classes: ({"any": next(scores) / 100}, None)  # noqa: E731
        monkeypatch.setattr(module, "mean_dice", better, raising=False)
    settings = {"steps": 8, "validate_every": 3, "voxels": 2000, "learning_rate": 0.01, "seed": 3}
    settings |= {} if name == "head" else {"probe": 4}
    classes, output = ["vertebra L1", "hip"], tmp_path / "package"
    given = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    line = [str(scans), *classes, "-o", str(tmp_path / "recipe"), "--model", str(model)]
    recipe.main([*line, "--device", "cpu", *given])
    told = capsys.readouterr().err
    assert told.index("vertebra L1: nearest in text") < told.index("new classes: Dice")
    options = {**settings, "output": output, "method": name, "device": "cpu"}
    tuned = finetune(model, scans, classes, **options)  # type: ignore[arg-type]
    assert tuned.best_step == settings["steps"]
    told = capsys.readouterr().err
    assert told.index("vertebra L1: nearest in text") < told.index(f"{name}:")
    kind = tuned.saved.name
    (weights,) = [path.name for path in tuned.saved.glob("*.safetensors") if kind in path.name]
    ours = tmp_path / "recipe" / kind / weights
    assert ours.read_bytes() == (tuned.saved / weights).read_bytes()
    table = (tmp_path / "recipe/report.csv").read_text()
    assert table == (output / "report.csv").read_text()


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
