"""Pretraining: it learns, it goes on where it stopped, and what it saves can be loaded."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from anatomies import paired_organs, write_paired_organs

from foundation import from_pretrained
from foundation.config import TextSpec
from foundation.errors import UsageError
from foundation.pretraining import train as training
from foundation.pretraining.sampler import Patches, PatchSettings, Sample
from foundation.pretraining.train import (
    Settings,
    Trainer,
    build_model,
    learning_rate_factor,
    main,
    train,
)
from foundation.taxonomy import CLASSES, NAMES, by_name

CPU = torch.device("cpu")
TINY = Settings(
    steps=6,
    warm_up=2,
    backbone_options={"widths": [16, 16, 16], "full": 16},
    patches=PatchSettings(patch_size=16, spacing_mm=8.0, voxels=1000, phantom_share=0.0),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_paired_organs(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted."""
    run = tmp_path_factory.mktemp("unbroken")
    train(data, run, TINY, CPU, workers=0, save_every=2)
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "last.pt", weights_only=True)
    return {
        f"{part}.{name}": tensor
        for part in ("model", "average", "auxiliary")
        for name, tensor in state[part].items()
    }


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def one_batch(settings: Settings) -> Sample:
    sample = Patches([paired_organs()], settings.patches, seed=0, first=0, last=9)[1]
    return {name: tensor[None] for name, tensor in sample.items()}  # type: ignore[return-value]


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], None]:
    """Make training stop before step `at`; call the result to mend it."""
    step = Trainer.train_step

    def broken(self: Trainer, batch: Sample) -> dict[str, float]:
        if self.step == at:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", broken)
    return monkeypatch.undo


@pytest.mark.parametrize("at", [1, 3, 4])
def test_an_interrupted_run_ends_as_the_unbroken_one(
    at: int, data: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend = interrupted(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path, TINY, CPU, workers=0, save_every=2)
    assert (tmp_path / "last.pt").exists() == (at >= 2)
    assert not (tmp_path / "model").exists()
    mend()
    train(data, tmp_path, TINY, CPU, workers=0, save_every=2)
    assert equal(weights(tmp_path), weights(unbroken))
    saved = [(run / "model" / "model.safetensors").read_bytes() for run in (tmp_path, unbroken)]
    assert saved[0] == saved[1]


def test_another_seed_is_another_run(data: Path, unbroken: Path, tmp_path: Path) -> None:
    train(data, tmp_path, replace(TINY, seed=2), CPU, workers=0)
    assert not equal(weights(tmp_path), weights(unbroken))


def test_a_worker_process_changes_nothing(data: Path, unbroken: Path, tmp_path: Path) -> None:
    train(data, tmp_path, TINY, CPU, workers=1)
    assert equal(weights(tmp_path), weights(unbroken))


def test_the_log_has_a_row_for_each_checkpoint(unbroken: Path) -> None:
    with (unbroken / "log.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert all(float(row["binary"]) > 0 and float(row["seconds_per_step"]) > 0 for row in rows)
    assert {path.name for path in unbroken.iterdir()} == {"last.pt", "log.csv", "model"}


def test_the_saved_model_is_the_average_and_loads(unbroken: Path) -> None:
    model = from_pretrained(str(unbroken / "model"))
    assert model.classes == NAMES
    config = model.config.preprocessing
    assert config.spacing_mm == (8.0, 8.0, 8.0) and config.patch_size == (16, 16, 16)
    assert config.hu_windows == TINY.patches.hu_windows
    average = torch.load(unbroken / "last.pt", weights_only=True)["average"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.float(), average[name].half().float())
    with torch.no_grad():
        assert model(torch.rand(1, 2, 16, 16, 16)).isfinite().all()


def test_a_finished_run_trains_no_further(data: Path, unbroken: Path) -> None:
    before = weights(unbroken)
    train(data, unbroken, TINY, CPU, workers=0, save_every=2)
    assert equal(weights(unbroken), before)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 9}, "seed"),
        ({"learning_rate": 1e-4, "clip": 1.0}, "clip, learning_rate"),
        ({"patches": replace(TINY.patches, voxels=999)}, "patches"),
        ({"backbone_options": {"widths": [16, 16, 32], "full": 16}}, "backbone_options"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, object], named: str, data: Path, unbroken: Path
) -> None:
    with pytest.raises(UsageError, match=rf"other settings \({named}\).*another folder"):
        train(data, unbroken, replace(TINY, **changes), CPU, workers=0)


def test_a_run_may_be_made_longer_or_shorter(tmp_path: Path) -> None:
    first = Trainer(TINY, CPU)
    first.train_step(one_batch(TINY))
    first.save(tmp_path / "last.pt")
    longer = Trainer(replace(TINY, steps=100, decay=0.5), CPU)
    longer.restore(tmp_path / "last.pt")
    assert longer.step == 1


def test_a_checkpoint_from_before_a_setting_existed_has_its_default(tmp_path: Path) -> None:
    settings = replace(TINY, backbone_options={})
    path = tmp_path / "last.pt"
    Trainer(settings, CPU).save(path)
    state = torch.load(path, weights_only=True)
    del state["settings"]["backbone_options"]
    torch.save(state, path)
    Trainer(settings, CPU).restore(path)
    with pytest.raises(UsageError, match="backbone_options"):
        Trainer(TINY, CPU).restore(path)


def test_the_loss_falls_on_one_patch() -> None:
    settings = replace(TINY, steps=1000, learning_rate=1e-2, head_learning_rate=2e-3)
    trainer, batch = Trainer(settings, CPU), one_batch(settings)
    first = trainer.train_step(batch)
    for _ in range(80):
        last = trainer.train_step(batch)
    assert last["exclusive"] < 0.6 * first["exclusive"]
    assert last["binary"] < 0.6 * first["binary"]
    assert last["auxiliary"] < 0.8 * first["auxiliary"]


def test_an_endless_loss_stops_the_run() -> None:
    trainer, batch = Trainer(TINY, CPU), one_batch(TINY)
    batch["image"][:] = float("nan")
    with pytest.raises(UsageError, match="The loss is nan at step 0: lower learning_rate"):
        trainer.train_step(batch)


def test_what_is_not_annotated_is_not_trained() -> None:
    """The classifier beside the head has weights of each class: those of unknown ones stay."""
    settings = replace(TINY, weight_decay=0.0)
    trainer, batch = Trainer(settings, CPU), one_batch(settings)
    before = trainer.auxiliary.weight.detach().clone()
    trainer.train_step(batch)
    moved = (trainer.auxiliary.weight != before).flatten(1).any(1)
    assert moved.tolist() == batch["annotated"][0].tolist()


def test_the_average_follows_the_model_slowly() -> None:
    settings = replace(TINY, steps=1000)
    trainer, batch = Trainer(settings, CPU), one_batch(settings)
    start = {name: value.clone() for name, value in trainer.average.items()}
    for _ in range(3):
        trainer.train_step(batch)
    name = "head.controller.weight"
    now, average = trainer.model.state_dict()[name], trainer.average[name]
    assert 0 < (average - start[name]).norm() < (now - start[name]).norm()
    averaged = trainer.averaged_model()
    assert not averaged.training
    assert torch.equal(averaged.state_dict()[name], average)


def test_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    settings = Settings(steps=1000, warm_up=100, decay=0.3)
    factors = [learning_rate_factor(step, settings) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[:100] == sorted(factors[:100])
    assert set(factors[99:700]) == {1.0}
    assert factors[850] == pytest.approx(0.5)
    assert factors[999] == pytest.approx(1 / 300)
    assert learning_rate_factor(1000, settings) == 0
    assert learning_rate_factor(0, replace(settings, warm_up=0)) == 1


def test_the_learning_rate_reaches_both_groups() -> None:
    trainer = Trainer(TINY, CPU)
    trainer.train_step(one_batch(TINY))
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([TINY.learning_rate / 2, TINY.head_learning_rate / 2])
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    everything = [*trainer.model.parameters(), *trainer.auxiliary.parameters()]
    assert trained == {id(parameter) for parameter in everything}


def test_the_untrained_model_has_every_class_with_its_prompt() -> None:
    model = build_model(TINY)
    assert model.classes == NAMES
    prompts = [spec.prompt for spec in model.config.classes]
    assert "kidney" in prompts[by_name("kidney_left").index]
    assert len(set(prompts)) == len(NAMES)
    standard = (model.prompt_embedding - model.head.text_shift) * model.head.text_scale
    assert 0.5 < standard.std() < 2
    assert model.head.text_scale > 1


def test_another_text_encoder_is_recorded_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TextSpec(encoder="open_clip:some/other", revision="abc", dim=24)
    embedding = 3.0 + torch.randn(len(CLASSES), spec.dim)
    monkeypatch.setitem(training.TEXT_ENCODERS, "clip", spec)
    monkeypatch.setattr(training, "embed_classes", lambda *_: embedding)
    model = build_model(replace(TINY, text="clip"))
    assert model.config.text == spec
    spread = (model.prompt_embedding - model.head.text_shift) * model.head.text_scale
    assert float(spread.mean()) == pytest.approx(0, abs=1e-5)
    assert float(spread.square().mean()) == pytest.approx(1, abs=1e-5)


def test_the_command_line_trains_and_reports_misuse(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[object, ...]] = []
    module = "foundation.pretraining.train.train"
    monkeypatch.setattr(module, lambda *given: seen.append(given))
    options = ["--steps", "10", "--learning-rate", "0.1", "--hold-out", "visible_human_male"]
    main([str(data), str(tmp_path), *options, "--device", "cpu"])
    main(["phantoms", str(tmp_path), "--device", "cpu"])
    expected = Settings(steps=10, learning_rate=0.1, hold_out=("visible_human_male",))
    assert seen == [(data, tmp_path, expected, CPU), (None, tmp_path, Settings(), CPU)]
    monkeypatch.undo()
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nothing"), str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "No training data in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_phantoms_alone_are_enough(tmp_path: Path) -> None:
    settings = replace(TINY, steps=2, patches=replace(TINY.patches, phantoms=1))
    folder = train(None, tmp_path, settings, CPU, workers=0)
    assert from_pretrained(str(folder)).classes == NAMES
