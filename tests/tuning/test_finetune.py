"""Fine-tuning end to end: each method learns, forgets what it must not little, and resumes."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tuning_trees import write_folders

from foundation import from_pretrained
from foundation.cli import main as cli
from foundation.config import Preprocessing
from foundation.data.naming import NewClass
from foundation.errors import UsageError
from foundation.hub.adapter_files import load_adapter
from foundation.hub.saved import save_pretrained
from foundation.imaging.bits import pack
from foundation.model import UniversalModel
from foundation.text import MINILM
from foundation.training.sample import PatchGrid
from foundation.tuning.data import read_data
from foundation.tuning.finetune import Tuned, finetune
from foundation.tuning.samples import FewScans
from foundation.tuning.tuner import Tuner

L1 = NewClass("vertebra L1")
QUICK = {"steps": 12, "validate_every": 6, "save_every": 4, "voxels": 2000, "windows": 4}
QUICK["probe"] = 4  # steps, of the methods that have them


@pytest.fixture(scope="module")
def base() -> UniversalModel:
    """The tiny model with the prompt bank's encoder, on the grid of the scans."""
    tiny = tiny_model()
    pre = Preprocessing(spacing_mm=(4.0,) * 3, patch_size=(16, 16, 16))
    config = replace(tiny.config, text=MINILM, preprocessing=pre)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return UniversalModel(config, torch.randn(3, MINILM.dim)).eval()


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("scans"), cases=3)


def tune(base: UniversalModel, scans: Path, run: Path, method: str, **changes: object) -> Tuned:
    options = {**QUICK, **changes}
    if method == "head":
        del options["probe"]
    return finetune(
        *(base, scans, [L1]), output=run, method=method, device="cpu", progress=False, **options
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["head", "lora", "full", "continual"])
def test_what_a_method_leaves(
    method: str, base: UniversalModel, scans: Path, tmp_path: Path
) -> None:
    state = {name: value.clone() for name, value in base.state_dict().items()}
    tuned = tune(base, scans, tmp_path / "run", method)
    assert tuned.new == ("vertebra L1",) and tuned.model.classes == (*base.classes, "vertebra L1")
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in state.items())
    assert tuned.report.is_file() and (tmp_path / "run" / "report.csv").is_file()
    assert set(tuned.summary()["dice"]) == {"vertebra L1", "liver"}
    if method == "lora":
        loaded = from_pretrained(save_pretrained(base, tmp_path / "base"))
        load_adapter(loaded, tuned.saved)
    else:
        loaded = from_pretrained(tuned.saved)
    assert loaded.classes == tuned.model.classes
    image = torch.linspace(0, 1, 16**3).view(1, 1, 16, 16, 16)
    with torch.no_grad():
        found, kept, before = loaded(image), tuned.model(image), base(image)
    torch.testing.assert_close(found, kept, rtol=0, atol=0.05)  # stored in half precision
    if method == "head":
        assert torch.equal(kept[:, :3], before), "it cannot change them"
    if method != "lora":
        assert "SHA-256 of its weights" in (tuned.saved / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "in_probe", "at"),
    [("head", True, 7), ("lora", False, 7), ("full", True, 2), ("full", False, 7),
     ("continual", False, 7)],
)  # fmt: skip
def test_a_killed_tuning_ends_as_the_unbroken_one(
    method: str,
    in_probe: bool,
    at: int,
    base: UniversalModel,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unbroken = tune(base, scans, tmp_path / "unbroken", method)
    step = Tuner._train_step

    def broken(self: Tuner) -> None:
        if self.step == at and (self.method.name == "head") == in_probe:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Tuner, "_train_step", broken)
        with pytest.raises(KeyboardInterrupt):
            tune(base, scans, tmp_path / "broken", method)
    resumed = tune(base, scans, tmp_path / "broken", method)
    one, other = (found.model.state_dict() for found in (unbroken, resumed))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("method", ["head", "full"])
def test_old_classes_that_no_scan_labels_are_compared_with_the_model_before(
    method: str, base: UniversalModel, scans: Path, tmp_path: Path
) -> None:
    """The scans label the liver; an untrained model sees a spleen at a low threshold only."""
    seeing = copy.deepcopy(base)
    pre = replace(base.config.preprocessing, threshold=0.1)
    seeing.config = replace(base.config, preprocessing=pre)
    tuned = tune(seeing, scans, tmp_path / "run", method, protect="nothing")
    told = tuned.summary()["agreement"]
    assert "spleen" in told and set(told) <= {"spleen", "liver_tumor"}
    agreed = {(row.dice, row.nsd) for row in tuned.agreement.rows}
    if method == "head":
        assert agreed == {(1.0, 1.0)}, "a frozen network gives the same masks, voxel by voxel"
    else:
        assert min(agreed) < (1.0, 1.0), "what was trained as absent has changed"
    assert "agreement with the model before" in tuned.report.read_text()
    assert f"{len(told)} old classes, not labelled" in tuned.table()
    assert "| spleen | " in (tuned.saved / "README.md").read_text().partition("## Agreement")[2]


def test_head_learns_what_the_features_show(
    base: UniversalModel, scans: Path, tmp_path: Path
) -> None:
    tuned = tune(base, scans, tmp_path / "run", "head", steps=160, validate_every=40)
    before, after = (found.mean(["vertebra L1"]) or 0.0 for found in (tuned.before, tuned.after))
    assert after > before + 0.2


def test_the_command_does_the_same(
    base: UniversalModel, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_pretrained(base, tmp_path / "base")
    run = tmp_path / "run"
    arguments = ["add-class", "vertebra L1", "--data", str(scans), "-m", str(model), "-o", str(run)]
    arguments += ["--steps", "2", "--device", "cpu", "--json", "-q"]
    assert cli.main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["saved"] == str(run / "model") and "vertebra L1" in told["dice"]
    assert len(told["nearest"]["vertebra L1"]) == 3
    assert cli.main([*arguments, "--label", "hip=7"]) == 2
    assert "with a class of vertebra L1" in capsys.readouterr().err


def test_an_unknown_structure_is_refused_before_anything_is_trained(
    base: UniversalModel, scans: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="pancreas duct"):
        finetune(base, scans, ["pancreas duct"], output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "model").exists()


def test_old_classes_that_a_scan_does_not_label_are_masked_absent_or_pseudo_labelled(
    base: UniversalModel, scans: Path, tmp_path: Path
) -> None:
    """The scans label the liver and no spleen."""
    options = {"spacing_mm": 4.0, "old_classes": base.classes, "progress": False}
    data = read_data(scans, classes=[L1], work=tmp_path, **options)  # type: ignore[arg-type]
    names = ("liver", "spleen", "vertebra L1")
    grid = PatchGrid((16, 16, 16), 4.0, ((-175.0, 250.0),), None, names)
    pseudo = {}  # the old model calls everything both
    for case in data.train:
        everything = pack(np.ones(case.shape, bool))
        pseudo[case.key] = {"liver": everything, "spleen": everything}
    found = {}
    for kind, given in (
        ("masked", {}),
        ("absent", {"absent": base.classes}),
        ("pseudo", {"pseudo": pseudo}),
    ):
        source = FewScans(data.train, ("vertebra L1",), **given)  # type: ignore[arg-type]
        found[kind] = source.draw(np.random.default_rng(3), grid)
    known = {kind: sample["annotated"].tolist() for kind, sample in found.items()}
    assert known["masked"] == [True, False, True]
    assert known["absent"] == known["pseudo"] == [True, True, True]
    assert not found["absent"]["target"][1].any()
    liver, spleen, bone = found["pseudo"]["target"]
    assert torch.equal(liver, found["masked"]["target"][0]), "its own labels come first"
    assert bone.any() and torch.equal(spleen, ~(liver | bone))
