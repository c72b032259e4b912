"""Fine-tuning end to end: each method learns, forgets what it must not little, and resumes."""

import copy
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_runs import assert_same_gradients, rows
from tuning_trees import write_folders

from foundation import from_pretrained
from foundation.adapting.adapters import set_adapter
from foundation.cli import main as cli
from foundation.cli.main import build_parser
from foundation.config import BranchSpec, Preprocessing
from foundation.data.naming import NewClass
from foundation.errors import UsageError
from foundation.hub.load import load_adapter
from foundation.hub.saved import save_pretrained
from foundation.imaging.bits import pack
from foundation.model import UniversalModel
from foundation.text import MINILM
from foundation.training.sample import PatchGrid
from foundation.training.trainer import Trainer
from foundation.tuning.data import read_data
from foundation.tuning.finetune import finetune
from foundation.tuning.methods import METHODS
from foundation.tuning.result import Tuned
from foundation.tuning.samples import FewScans

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


@pytest.mark.parametrize(
    "method",
    ["head", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora", "full", "continual"))],
)
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
    card = (tuned.saved / "README.md").read_text()
    assert "SHA-256 of its weights" in card and "| vertebra L1 | " in card
    assert f"Base model: `{base.config.name}`" in card, "not the run's folder"


@pytest.mark.parametrize(
    ("method", "in_probe", "at"),
    [
        ("head", True, 7),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("lora", False, 7),
                ("full", True, 2),
                ("full", False, 7),
                ("continual", False, 7),
            )
        ),
    ],
)
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
    step = Trainer.train_step

    def broken(self: Trainer, batches: Any) -> None:
        if self.step == at and (self.config.title == "head") == in_probe:
            raise KeyboardInterrupt
        step(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", broken)
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
    options = {} if method == "head" else {"protect": "nothing"}
    tuned = tune(seeing, scans, tmp_path / "run", method, **options)
    told = tuned.summary()["agreement"]
    assert "spleen" in told and set(told) <= {"spleen", "liver_tumor"}
    agreed = {(row.dice, row.nsd) for row in tuned.agreement.rows}
    if method == "head":
        assert agreed == {(1.0, 1.0)}, "a frozen network gives the same masks, voxel by voxel"
    else:
        assert min(agreed) < (1.0, 1.0), "what was trained as absent has changed"
    assert "agreement with the model before" in tuned.report.read_text()
    assert f"{len(told)} old classes, not labelled" in tuned.table()
    card = (tuned.saved / "README.md").read_text()
    assert "| spleen | " in card.partition("This is agreement, not accuracy")[2]


@pytest.mark.slow
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
    quiet = [each for each in arguments if each != "--json"]
    assert cli.main(quiet) == 0
    assert capsys.readouterr().out == f"{run / 'model'}\n"
    assert cli.main([*quiet, "--parent", "psoas"]) == 2
    error = capsys.readouterr().err
    assert "The parent of 'vertebra L1' must be a class of the model, or one that is" in error


def test_classes_may_stand_anywhere_among_the_options() -> None:
    parser = build_parser()
    line = ["add-class", "a", "--label", "a=x", "b", "--data", "d", "-o", "out", "c"]
    args = parser.parse_args(line)
    assert args.classes == ["a", "b", "c"] and args.label == ["a=x"]


def test_the_help_lists_the_methods_with_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["add-class", "--help"])
    told = capsys.readouterr().out
    assert all(method.summary in told for method in METHODS.values())


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


# --- a class that the model has -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "learning_rate"), [("lora", 0.01), ("full", 0.002), ("continual", 0.005)]
)
def test_a_known_class_is_tuned_further(
    method: str, learning_rate: float, base: UniversalModel, scans: Path, tmp_path: Path
) -> None:
    """It keeps its name and its channel, and nothing is added to the model.

    The learning rates lie well inside the range in which each method learns. At 0.01, ``full``
    learns on some processors and collapses on others.
    """
    options = {**QUICK, "learning_rate": learning_rate, "backbone_rate": 1.0, "probe": None}
    options |= {"steps": 80, "validate_every": 40}
    tuned = finetune(
        *(base, scans, ["Liver"]), output=tmp_path / "run", method=method, device="cpu",
        progress=False, **options,
    )  # type: ignore[arg-type]  # fmt: skip
    assert tuned.new == ("liver",) and tuned.old == ("spleen", "liver_tumor")
    assert tuned.model.classes == base.classes and not tuned.neighbours
    assert not (tmp_path / "run" / "tuning" / "probe").exists(), "no head has to learn alone"
    assert set(tuned.summary()["dice"]) == {"liver"}
    before, after = (found.mean(["liver"]) or 0.0 for found in (tuned.before, tuned.after))
    assert after > before
    if method == "lora":
        loaded = from_pretrained(save_pretrained(base, tmp_path / "base"))
        load_adapter(loaded, tuned.saved)
        assert loaded.classes == base.classes
        set_adapter(loaded, None)
        image = torch.linspace(0, 1, 16**3).view(1, 1, 16, 16, 16)
        with torch.no_grad():
            assert torch.equal(loaded(image), base(image)), "the old model comes back"


@pytest.mark.slow
def test_head_gives_a_known_class_a_branch_that_computes_it(
    base: UniversalModel, scans: Path, tmp_path: Path
) -> None:
    """The other classes stay the same, bit for bit, also after saving and a second tuning."""
    options: Any = {"device": "cpu", "progress": False, "voxels": 2000, "windows": 4}
    options |= {"steps": 60, "validate_every": 30}
    first = finetune(base, scans, ["liver"], output=tmp_path / "first", **options)
    assert first.model.classes == base.classes and first.new == ("liver",)
    before, after = (found.mean(["liver"]) or 0.0 for found in (first.before, first.after))
    assert after > before
    loaded = from_pretrained(first.saved)
    assert loaded.config.branches == (BranchSpec(("liver",), "side", 24, True),)
    image = torch.linspace(0, 1, 16**3).view(1, 1, 16, 16, 16)
    voxels = torch.arange(100)[None]
    with torch.no_grad():
        old, new = base(image), first.model(image)
        stored = copy.deepcopy(first.model)
        for weight in stored.parameters():
            weight.copy_(weight.half())  # as weights are stored
        torch.testing.assert_close(loaded(image), stored(image), rtol=1e-4, atol=1e-4)
        assert torch.equal(new[:, 1:], old[:, 1:]) and not torch.equal(new[:, 0], old[:, 0])
        assert torch.equal(first.model(image, [2, 0]), new[:, [2, 0]])
        sampled = first.model.logits_at(image, voxels)[0]
        torch.testing.assert_close(sampled, new.flatten(2)[..., :100], rtol=1e-4, atol=1e-4)
    second = finetune(
        first.model, scans, ["liver"], output=tmp_path / "second", **{**options, "steps": 1}
    )
    again = second.before.mean(["liver"])
    assert again == pytest.approx(after), "it goes on from the branch that there is"
    with pytest.raises(UsageError, match="learns known and new classes apart"):
        finetune(base, scans, ["liver", L1], output=tmp_path / "third", **options)


def test_known_and_new_classes_are_learnt_together(
    base: UniversalModel, scans: Path, tmp_path: Path
) -> None:
    tuned = finetune(
        *(base, scans, ["vertebra L1", "liver"]), output=tmp_path / "run", method="full",
        device="cpu", progress=False, **QUICK,
    )  # type: ignore[arg-type]  # fmt: skip
    assert tuned.model.classes == (*base.classes, "vertebra L1")
    assert set(tuned.new) == {"vertebra L1", "liver"} and "liver" not in tuned.old


def test_what_a_known_class_is_cannot_be_changed(
    base: UniversalModel, scans: Path, tmp_path: Path
) -> None:
    options: Any = {"output": tmp_path / "run", "method": "full", "progress": False}
    with pytest.raises(UsageError, match="'liver' is a class of the model with the prompt"):
        finetune(base, scans, [NewClass("liver", "A CT of a large liver")], **options)
    with pytest.raises(UsageError, match="'liver_tumor' is a class of the model in 'liver'"):
        finetune(base, scans, [NewClass("liver_tumor", parent="spleen")], **options)
    assert not (tmp_path / "run").exists()


# --- several processes ----------------------------------------------------------------------------


def processes(count: int, model: Path, scans: Path, run: Path, **options: Any) -> None:
    """Tune with processes of their own, as torchrun starts them."""
    script = (
        "import json, sys\nfrom foundation import finetune\n"
        "model, scans, run, options = sys.argv[1:]\n"
        "tuned = finetune(model, scans, ['vertebra L1'], output=run, device='cpu', "
        "progress=False, **json.loads(options))\n"
        "assert tuned.after.rows and tuned.report.is_file()\n"
    )
    line = [sys.executable, "-c", script, str(model), str(scans), str(run), json.dumps(options)]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(count):
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment = {**os.environ, **where, **{k: str(v) for k, v in named.items()}}
        started.append(subprocess.Popen(line, env={**environment, "OMP_NUM_THREADS": "1"}))
    try:
        assert [process.wait(timeout=300) for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "head"])
def test_two_processes_do_what_one_does_with_twice_the_batch(
    method: str, base: UniversalModel, scans: Path, tmp_path: Path
) -> None:
    model = save_pretrained(base, tmp_path / "base")
    options = {"method": method, "steps": 1, "validate_every": 1, "voxels": 500, "windows": 4}
    options |= {"precision": "float32"}
    # The head alone learns from batches of one scan: only the step after it is compared.
    options |= {} if method == "head" else {"probe": 0}
    two, one = tmp_path / "two", tmp_path / "one"
    processes(2, model, scans, two, **options)
    processes(1, model, scans, one, **{**options, "batch_size": 2})
    moments = [load_file(run / "tuning/last/optimizer.safetensors") for run in (two, one)]
    assert_same_gradients(*moments)
    validated = [rows(run / "tuning" / "validation.csv") for run in (two, one)]
    for shared, alone in zip(*validated, strict=True):
        assert float(shared["mean"]) == pytest.approx(float(alone["mean"]), abs=0.05)
    saved = "adapter" if method == "lora" else "model"
    assert (two / saved).is_dir() and (two / "report.html").is_file()
