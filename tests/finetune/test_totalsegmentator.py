"""The recipe of TotalSegmentator's tasks: both versions' trees, subsets, resuming, mistakes."""

import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from tiny import tiny_model
from tuning_trees import SPACING_MM

from foundation.config import Preprocessing
from foundation.data.naming import Naming, NewClass
from foundation.errors import UsageError
from foundation.evaluation.scores import Score, Scores
from foundation.hub.saved import load_folder
from foundation.model import UniversalModel
from foundation.text import MINILM
from foundation.training.trainer import Trainer
from foundation.tuning.tasks import TASKS, get_task
from foundation.tuning.transfer import TransferSettings, transfer_method

PATH = REPOSITORY / "finetune" / "totalsegmentator.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("totalsegmentator", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["totalsegmentator"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trees(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Cardiac scans as version 1 and version 2 have them: 18 and 12 structures."""
    root = tmp_path_factory.mktemp("trees")
    return {
        version: recipe.write_tree(
            root / f"v{version}", get_task("cardiac").in_version(version), SPACING_MM
        )
        for version in (1, 2)
    }


Learn = Callable[..., Scores]


@pytest.fixture
def learn(recipe: ModuleType, trees: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> Learn:
    """The recipe with a tiny network in the place of the weights; two steps."""

    def tiny(_: str) -> UniversalModel:
        # Not 16³, see test_tuning_linear.
        grid = Preprocessing(spacing_mm=(SPACING_MM,) * 3, patch_size=(24, 16, 16))
        config = replace(tiny_model().config, text=MINILM, preprocessing=grid)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return UniversalModel(config, torch.randn(3, MINILM.dim)).eval()

    monkeypatch.setattr(recipe, "from_pretrained", tiny)

    def run(output: Path, version: int = 1, **changes: Any) -> Scores:
        given = {"task": "cardiac", "device": "cpu", "steps": 2, **changes}
        found: Scores = recipe.learn(
            recipe.Settings(trees[version], output, version=version, **given)
        )
        return found

    return run


@pytest.mark.slow
def test_smoke() -> None:
    command = [sys.executable, str(PATH), "--smoke", "--shots", "2", "--task", "ribs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY / "finetune")
    assert done.returncode == 0, done.stderr
    assert "foreground mean Dice, 24 of 24 classes in 1 test scans" in done.stdout


@pytest.mark.parametrize(
    ("version", "head"),
    [
        (2, "text"),
        pytest.param(1, "softmax", marks=pytest.mark.slow),
        pytest.param(2, "sigmoid", marks=pytest.mark.slow),
    ],
)
def test_what_a_run_leaves(
    version: int, head: str, learn: Learn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = get_task("cardiac").in_version(version)  # type: ignore[arg-type]
    out = tmp_path / "run"
    after = learn(out, version, head=head, shots=2)
    assert set(after.classes) == set(classes) and after.cases == ("masks/s0005",)
    printed = capsys.readouterr().out
    assert f"foreground mean Dice, {len(classes)} of {len(classes)} classes in 1 test" in printed
    assert Scores.read(out / "after.json") == after
    with (out / "report.csv").open(newline="") as file:
        names = {row["class"] for row in csv.DictReader(file)}
    assert set(classes) <= names and "background" not in names
    assert "TotalSegmentator" in (out / "report.html").read_text(encoding="utf-8")
    splits = json.loads((out / "data" / "splits.json").read_text())
    subset = json.loads((out / "data" / "subsets.json").read_text())["subsets"]["2"]
    assert splits["train"] == sorted(f"masks/{id_}" for id_ in subset)
    assert (splits["validation"], splits["test"]) == (["masks/s0004"], ["masks/s0005"])
    saved = load_folder(out / "model")
    assert saved.config.class_names == classes
    if head == "text":
        assert saved.config.classes[0].prompt == "A computerized tomography of a esophagus"


@pytest.mark.slow
def test_started_again_it_goes_on_to_the_same_weights(
    recipe: ModuleType, learn: Learn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def often(*given: Any, **options: Any) -> TransferSettings:
        return replace(transfer_method(*given, **options), save_every=2, validate_every=3)

    monkeypatch.setattr(recipe, "transfer_method", often)
    options = {"steps": 6, "learning_rate": 1e-2}
    learn(tmp_path / "unbroken", **options)
    step = Trainer.train_step
    seen: list[int] = []
    last = 5

    def counted(self: Trainer, batches: Any) -> None:
        if self.step == last:
            raise KeyboardInterrupt
        seen.append(self.step)
        step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", counted)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "broken", **options)
    assert seen == [0, 1, 2, 3, 4] and not (tmp_path / "broken" / "model").exists()
    seen.clear()
    last = 6
    learn(tmp_path / "broken", **options)
    assert seen == [4, 5]
    one, other = (load_folder(tmp_path / run / "model") for run in ("unbroken", "broken"))
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    with pytest.raises(UsageError, match="other settings"):
        learn(tmp_path / "broken", **{**options, "learning_rate": 1e-3})


def test_classes_that_few_scans_do_not_show_count_all_the_same(
    recipe: ModuleType, learn: Learn, trees: dict[int, Path], tmp_path: Path
) -> None:
    """The one training scan has an empty mask of the colon; the test scan shows a colon."""
    root = tmp_path / "data"
    recipe.write_tree(root, get_task("cardiac").in_version(1), SPACING_MM)
    for scan in range(4):
        path = root / f"s{scan:04d}" / "segmentations" / "colon.nii.gz"
        image = nib.load(path)
        empty = np.zeros(image.shape, np.uint8)
        nib.save(nib.Nifti1Image(empty, image.affine), path)
    settings = recipe.Settings(
        root, tmp_path / "run", task="cardiac", shots=1, steps=1, device="cpu"
    )
    after = recipe.learn(settings)
    assert "colon" in after.classes
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "No training scan shows colon: in the mean they count all the same." in page


def test_the_mean_is_over_the_classes_that_are_shown(recipe: ModuleType) -> None:
    rows = (
        Score("a", "liver", 0.8, 0.5),
        Score("b", "liver", 0.6, 0.5),
        Score("a", "aorta", 0.1, 0),
    )
    scores = Scores(rows, 2.0, 1.5)
    text = recipe.summary(("liver", "aorta", "pancreas"), scores, scores)
    assert text.startswith("foreground mean Dice, 2 of 3 classes in 2 test scans: 0.400 before")


@pytest.mark.parametrize("version", [1, 2])
def test_any_class_may_be_the_one_to_learn_and_the_others_known(version: Any) -> None:
    for task in TASKS.values():
        classes = task.in_version(version)
        for place in (0, len(classes) // 2, len(classes) - 1):
            new = classes[place]
            old = tuple(name for name in classes if name != new)
            naming = Naming((NewClass(new, labels=(new,)),), old)
            assert all(naming.classes(label) == (label,) for label in classes)
            assert set(naming.annotated(classes)) == set(classes)


# --- mistakes -------------------------------------------------------------------------------------


def test_wrong_settings(recipe: ModuleType) -> None:
    place = (Path("data"), Path("run"))
    for changes, message in (
        ({"task": "bones"}, "Choose one of organs, vertebrae"),
        ({"version": 3}, "versions 1 and 2, not 3"),
        ({"head": "linear"}, "Choose one of softmax, sigmoid, text"),
        ({"start": "scratch"}, "--backbone NAME go together"),
        ({"backbone": "unet"}, "--backbone NAME go together"),
        ({"epochs": 0}, "epochs is 0"),
        ({"shots": 0}, "shots is 0"),
    ):
        with pytest.raises(UsageError, match=message):
            recipe.Settings(*place, **changes)


def test_wrong_data(
    recipe: ModuleType, learn: Learn, trees: dict[int, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"shots is 5; .* has 4 training scans"):
        learn(tmp_path / "run", shots=5)
    with pytest.raises(UsageError, match=r"has no heart_myocardium.*Give the version"):
        recipe.learn(recipe.Settings(trees[2], tmp_path / "run", task="cardiac", device="cpu"))
    with pytest.raises(UsageError, match=r"meta\.csv does not exist"):
        recipe.learn(recipe.Settings(tmp_path / "nowhere", tmp_path / "run", device="cpu"))
    (tmp_path / "meta.csv").write_text("image_id,split\ns1,train\n")
    with pytest.raises(UsageError, match="has no scan for test"):
        recipe.learn(recipe.Settings(tmp_path, tmp_path / "run", device="cpu"))
    (tmp_path / "meta.csv").write_text("image_id,split\ns1,train\ns2,test\n")
    with pytest.raises(UsageError, match="None of the 1 training scans"):
        recipe.learn(recipe.Settings(tmp_path, tmp_path / "run", device="cpu"))


def test_generated_scans_are_not_written_into_a_dataset(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        recipe.main([str(tmp_path), "--smoke"])
    assert "leave DATA out" in capsys.readouterr().err and not any(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        recipe.main([str(tmp_path)])
    assert "give DATA and -o OUT" in capsys.readouterr().err


@pytest.mark.slow
def test_a_mistake_is_one_line_without_a_trace(tmp_path: Path) -> None:
    command = [sys.executable, str(PATH), str(tmp_path), "-o", str(tmp_path / "run"), "--task", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("totalsegmentator.py: Unknown task 'x'. Choose one of organs")
