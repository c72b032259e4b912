"""The pretraining engine: it learns, goes on after any kill as if nothing had been, and shares."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import assert_same_gradients, assert_same_run, go, rows, state
from tiny_store import tiny_config, write_store

from foundation import from_pretrained
from foundation.cli import pretrain as command
from foundation.data.store.arrays import Store
from foundation.errors import MissingExtraError, UniversalCTError, UsageError, WeightsError
from foundation.evaluation.scoring import score_case
from foundation.pretraining import run as module
from foundation.pretraining.network import build_model
from foundation.pretraining.reading import load_config
from foundation.pretraining.run import Pretraining, pretrain
from foundation.pretraining.sources import batches, grid_of
from foundation.taxonomy import NAMES
from foundation.training.mixture import Mixture
from foundation.training.trainer import Trainer, accelerator_for


def made(config: dict[str, Any], run: Path, *overrides: str) -> Pretraining:
    """A run that has not trained yet."""
    return Pretraining(load_config(config, overrides), accelerator_for("float32", "cpu"), run)


# --- a run ----------------------------------------------------------------------------------------


def test_what_a_run_leaves(unbroken: Path) -> None:
    found = {path.name for path in unbroken.iterdir()}
    assert found == {"config.yaml", "folds.json", "log.csv", "last", "model"}
    log = rows(unbroken / "log.csv")
    assert [row["step"] for row in log] == ["1", "2", "3", "4", "5", "6"]
    terms = ("dice", "binary", "exclusive", "auxiliary")
    for row in log:
        assert float(row["loss"]) == pytest.approx(sum(float(row[t]) for t in terms), rel=1e-4)
    assert {"loss/03", "loss/04", "loss/10_09"} < set(log[0])
    assert any(float(row["loss/04"] or 0) > 0 for row in log)
    progress = json.loads((unbroken / "last" / "state.json").read_text())
    assert progress["step"] == 6


def test_the_saved_model_is_the_average(unbroken: Path) -> None:
    model = from_pretrained(unbroken / "model")
    assert model.classes == NAMES
    assert model.config.text.encoder == "one-hot"
    assert model.config.preprocessing.spacing_mm == (4.0, 4.0, 4.0)
    average = load_file(unbroken / "last" / "ema.safetensors")
    live = load_file(unbroken / "last" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, average[name])
    assert not torch.equal(average["head.controller.weight"], live["model.head.controller.weight"])


def test_one_hot_vectors_can_have_places_to_spare() -> None:
    changes = ["model.text=one-hot", "model.spare_places=2"]
    model = build_model(load_config(tiny_config(), changes))
    count = len(model.classes)
    assert torch.equal(model.prompt_embedding, torch.eye(count, count + 2))
    with pytest.raises(UsageError, match="text needs none"):
        load_config(tiny_config(), ["model.text=minilm", "model.spare_places=2"])


@pytest.mark.slow
def test_a_single_class_can_be_trained_without_text(tmp_path: Path) -> None:
    """Its one-hot embedding has no spread by which it could be standardised."""
    config = tiny_config(
        None,
        model={**tiny_config()["model"], "classes": ["liver"]},
        stages=[{"steps": 1, "patch_size": 16, "spacing_mm": 8}],
        sources=[{"kind": "phantoms", "count": 1}],
    )
    go(config, tmp_path)
    (row,) = rows(tmp_path / "log.csv")
    assert 0 < float(row["loss"]) < 10
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())


def test_without_average_the_last_weights_are_published(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(store, ema=None, stages=[{"steps": 1, "patch_size": 16, "spacing_mm": 4}])
    go(config, run)
    live = load_file(run / "last" / "model.safetensors")
    model = from_pretrained(run / "model").state_dict()
    assert all(torch.equal(tensor, live[f"model.{name}"]) for name, tensor in model.items())
    assert not (run / "last" / "ema.safetensors").exists()


def test_the_loss_falls(store: Path, tmp_path: Path) -> None:
    stages = [{"steps": 16, "patch_size": 16, "spacing_mm": 4, "batch_size": 2}]
    config = tiny_config(store, stages=stages, save_every=99, logging={"every": 4})
    go(config, tmp_path, "optimizer.learning_rate=1e-2")
    losses = [float(row["loss"]) for row in rows(tmp_path / "log.csv")]
    assert losses[-1] < 0.85 * losses[0]


# --- gradients ------------------------------------------------------------------------------------


def first_batch(run: Pretraining, count: int = 2) -> dict[str, torch.Tensor]:
    from torch.utils.data import default_collate

    grid = engine_grid(run)
    return default_collate([run.mixture.sample(number, grid) for number in range(count)])


def engine_grid(run: Pretraining) -> Any:
    return grid_of(run.config, run.config.stages[-1], run.classes)


@pytest.mark.parametrize("exclusive", [0, 1])
def test_masked_classes_have_gradients_of_exactly_zero(
    exclusive: int, store: Path, tmp_path: Path
) -> None:
    run = made(tiny_config(store), tmp_path, f"loss.exclusive={exclusive}")
    batch = first_batch(run, 4)
    logits: list[torch.Tensor] = []

    def keep(_: Any, __: Any, outputs: Any) -> None:
        for output in outputs:
            output.retain_grad()
            logits.append(output)

    run.network.register_forward_hook(keep)
    terms = run.losses(run.network, batch, 0, run.accelerator)
    sum(values.sum() for values in terms.values()).backward()
    for output in logits:
        assert not output.grad[~batch["annotated"]].any()
        assert output.grad[batch["annotated"]].abs().sum(1).all()
    # The classifier beside the head has parameters of each class, which serve that class alone.
    never = ~batch["annotated"].any(0)
    for parameter in run.network.auxiliary.parameters():
        assert not parameter.grad[never].any()
        assert parameter.grad[~never].flatten(1 if parameter.dim() > 1 else 0).any()


def test_accumulated_batches_are_one_larger_batch(store: Path, tmp_path: Path) -> None:
    stage = {"steps": 1, "patch_size": 16, "spacing_mm": 4}
    found = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        stages = [{**stage, "batch_size": batch_size, "accumulation": accumulation}]
        run = tmp_path / str(batch_size)
        go(tiny_config(store, stages=stages), run)
        found.append((state(run), rows(run / "log.csv")))
    assert_same_gradients(found[0][0], found[1][0])
    losses = [float(log[0]["loss"]) for _, log in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- validation and the rest ----------------------------------------------------------------------


def test_validation_keeps_the_best_model(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.7, 0.6])

    def scripted(model: Any, cases: Any, overlap: float) -> torch.Tensor:
        assert overlap == 0.25 and [case.key for case in cases] == sorted(held)
        totals = torch.zeros(2, len(model.classes), dtype=torch.float64)
        totals[:, NAMES.index("liver")] = torch.tensor([2 * next(scores), 2])
        return totals

    held = {"03/case_0", "10_09/case_1"}
    monkeypatch.setattr(module, "validate", scripted)
    seen: list[bytes] = []
    validation = {"every": 2, "hold_out": sorted(held), "overlap": 0.25}
    save = Pretraining._save_model

    def saving(self: Pretraining, trainer: Trainer, name: str) -> Path:
        folder = save(self, trainer, name)
        seen.append((name.encode()) + str(trainer.step).encode())
        return folder

    monkeypatch.setattr(Pretraining, "_save_model", saving)
    go(tiny_config(store, validation=validation), tmp_path / "run")
    assert seen == [b"best2", b"best4", b"model6"]
    table = rows(tmp_path / "run" / "validation.csv")
    assert [(row["step"], row["mean"], row["liver"]) for row in table] == [
        ("2", "0.5", "0.5"),
        ("4", "0.7", "0.7"),
        ("6", "0.6", "0.6"),
    ]
    assert not table[0]["spleen"]
    assert from_pretrained(tmp_path / "run" / "best").classes == NAMES


def test_dice_of_a_stored_case(store: Path, unbroken: Path) -> None:
    model, case = from_pretrained(unbroken / "model"), Store(store).case("03/case_2")
    (found,) = score_case(model, case, overlap=0.0, postprocess=False)
    assert found.name == "liver" and 0 <= found.dice <= 1
    head = model.head.controller
    with torch.no_grad():  # everything is liver: Dice is 2 |liver| / (|known| + |liver|)
        head.weight.zero_()
        head.bias.zero_()
        head.bias[-1] = 9.0
    labels = case.read_labels()
    known = labels != case.unknown[0]
    liver = (labels == 1).sum()
    expected = 2 * liver / (known.sum() + liver)
    (found,) = score_case(model, case, overlap=0.0, postprocess=False)
    assert found.dice == pytest.approx(expected, rel=1e-6)


def test_held_out_cases_are_not_trained_on(store: Path, tmp_path: Path) -> None:
    config = tiny_config(store, validation={"fold": 1, "hold_out": ["04/case_1"]})
    run = made(config, tmp_path)
    trained = {case.key for source in run.mixture.sources for case in source.cases}
    assert not trained & run.validated and "04/case_1" in run.validated
    assert trained | run.validated == set(Store(store).keys())


def test_a_last_stage_trains_on_held_out_cases_and_keeps_the_model_before(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = "03/case_1"
    first, second = tiny_config(store)["stages"]
    stages = [{**first, "steps": 2}, {**second, "steps": 4, "all_cases": True}]
    validation = {"hold_out": [held], "every": 1}
    config = tiny_config(store, stages=stages, validation=validation)
    step, validated = Trainer.train_step, []
    monkeypatch.setattr(Trainer, "_validate", lambda self: validated.append(self.step))

    def broken(self: Trainer, samples: Any) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        step(self, samples)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", broken)
        with pytest.raises(KeyboardInterrupt):
            go(config, tmp_path / "run")
    before = load_file(tmp_path / "run/held_out/model.safetensors")
    go(config, tmp_path / "run")
    assert validated == [1, 2], "what is trained on is no measure any more"
    after = load_file(tmp_path / "run/held_out/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = load_file(tmp_path / "run/model/model.safetensors")
    assert any(not torch.equal(before[name], model[name]) for name in before)

    run = made(config, tmp_path / "made")
    assert run.whole is not None
    keys = [
        {case.key for source in mixture.sources for case in source.cases}
        for mixture in (run.mixture, run.whole)
    ]
    assert keys[1] - keys[0] == {held}
    drawn: list[Mixture] = []
    sample = Mixture.sample

    def noting(self: Mixture, *given: Any) -> Any:
        drawn.append(self)
        return sample(self, *given)

    monkeypatch.setattr(Mixture, "sample", noting)
    assert len(list(batches(run.mixture, run.config, NAMES, first_step=1, whole=run.whole))) == 5
    assert [each is run.whole for each in drawn] == 2 * [False] + 8 * [True]


def test_weights_to_start_from(store: Path, unbroken: Path, tmp_path: Path) -> None:
    run = made(tiny_config(store), tmp_path, f"initialise_from={unbroken / 'model'}")
    start = from_pretrained(unbroken / "model").state_dict()
    for name, tensor in run.network.model.state_dict().items():
        assert torch.equal(tensor, start[name])
    wider = {**tiny_config()["model"], "backbone_options": {"widths": [16, 16, 32], "full": 16}}
    with pytest.raises(WeightsError):
        made(tiny_config(store, model=wider), tmp_path, f"initialise_from={unbroken / 'model'}")


def test_precision_and_layout_of_memory_train(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU without the instructions is slow at it, but not wrong.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    stages = [{"steps": 1, "patch_size": 24, "spacing_mm": 4}]
    config = tiny_config(store, stages=stages, channels_last=True, checkpoint_activations=True)
    go(config, tmp_path / "run", "precision=bfloat16")
    weights = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(w.isfinite().all() and w.dtype == torch.float32 for w in weights.values())


def test_channels_last_resumes_bit_for_bit(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(store, channels_last=True)
    go(config, tmp_path / "one")
    step = Trainer.train_step

    def broken(self: Trainer, samples: Any) -> None:
        if self.step == 4:
            raise KeyboardInterrupt
        step(self, samples)

    monkeypatch.setattr(Trainer, "train_step", broken)
    with pytest.raises(KeyboardInterrupt):
        go(config, tmp_path / "two")
    monkeypatch.undo()
    go(config, tmp_path / "two")
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_an_endless_loss_stops_the_run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = Pretraining.losses

    def endless(self: Pretraining, *given: Any) -> dict[str, torch.Tensor]:
        return {k: v * float("nan") for k, v in losses(self, *given).items()}

    monkeypatch.setattr(Pretraining, "losses", endless)
    with pytest.raises(UsageError, match=r"The loss is nan at step 1: lower optimizer"):
        go(tiny_config(store), tmp_path)
    assert not (tmp_path / "last").exists()


def test_tensorboard_is_asked_for(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = tiny_config(store, logging={"every": 1, "tensorboard": True})
    with pytest.raises(MissingExtraError, match=r"tensorboard is not installed.*\[train\]"):
        go(config, tmp_path)


def test_a_patch_that_does_not_fit_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs multiples of 8"):
        go(tiny_config(store), tmp_path, "stages.1.patch_size=20")
    assert not list(tmp_path.iterdir())


def test_the_command(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser.add_subparsers())
    seen: dict[str, Any] = {}

    def fake(config: str, **options: Any) -> Path:
        seen.update(options, config=config)
        return Path("model")

    monkeypatch.setattr(module, "pretrain", fake)
    line = ["pretrain", "unet", "a=1", "--store", "s", "seed=3", "-o", "r", "--smoke"]
    assert command.run(parser.parse_args(line)) == 0
    assert (
        seen["config"] == "unet" and seen["overrides"] == ["a=1", "seed=3"] and seen["smoke_test"]
    )
    assert (seen["store"], seen["output"]) == ("s", "r")
    assert capsys.readouterr().out == "model\n"
    with monkeypatch.context() as patched:
        patched.setenv("RANK", "1")  # of several processes one prints
        assert command.run(parser.parse_args(line)) == 0
    assert not capsys.readouterr().out
    with pytest.raises(UniversalCTError, match="is not KEY=VALUE"):
        command.run(parser.parse_args(["pretrain", "unet", "seed"]))


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    folder = pretrain("universal-ct", output=tmp_path, smoke_test=True, progress=False)
    assert from_pretrained(folder).config.text.encoder == "one-hot"


def test_a_stage_has_its_own_rate_and_balance(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tiny_config(store)["stages"]
    first = {**first, "steps": 2, "rate": 3.0, "balance": 0.5}
    stages = [first, {**second, "steps": 2}]
    loss = {"exclusive": 1, "balance": 0.25, "sample_voxels": 500}
    values = tiny_config(store, stages=stages, loss=loss, ema=None)
    seen: list[float] = []

    def losses(logits: torch.Tensor, *_: object, balance: float, **__: object) -> object:
        seen.append(balance)
        return {name: logits.flatten(1).mean(1) for name in ("dice", "binary", "exclusive")}

    monkeypatch.setattr("foundation.pretraining.run.scan_losses", losses)
    overrides = ["schedule.kind=trapezoid", "schedule.decay=0", "logging.every=1"]
    go(values, tmp_path, *overrides, "schedule.warm_up=0", "optimizer.learning_rate=0.01")
    rates = [float(row["learning_rate"]) for row in rows(tmp_path / "log.csv")]
    assert rates == pytest.approx([0.03, 0.03, 0.01, 0.01])
    assert seen == pytest.approx([0.5, 0.5, 0.25, 0.25])


def test_a_class_that_only_the_store_has_is_trained(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["prompts"] = {"spine": "A CT of a spine"}
    for key, entry in manifest["cases"].items():
        if key.startswith("03/"):  # what was liver is the user's own spine there
            path = store / entry["folder"] / "case.json"
            about = json.loads(path.read_text().replace('"liver"', '"spine"'))
            del about["sha256"]
            path.write_text(json.dumps(about))
            entry["annotated"] = about["annotated"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    model = go(tiny_config(store), tmp_path / "run")
    classes = json.loads((model / "config.json").read_text())["classes"]
    assert [each["name"] for each in classes] == [*NAMES, "spine"]
    assert classes[-1]["prompt"] == "A CT of a spine"
    assert load_config(tmp_path / "run/config.yaml").model.classes[-1].name == "spine"
    # Not drawn from, or other classes are asked for: then it is no class of the run.
    scans = {"kind": "scans", "datasets": ["04"]}
    for number, changes in enumerate(
        (
            {"sources": [scans]},
            {
                "model": {
                    **tiny_config()["model"],
                    "classes": [{"name": "liver"}, {"name": "spleen"}],
                }
            },
        )
    ):
        model = go(tiny_config(store, **changes), tmp_path / f"{number}")
        classes = json.loads((model / "config.json").read_text())["classes"]
        assert "spine" not in [each["name"] for each in classes]
