"""A run that is killed, resumed or shared among processes ends as the unbroken one alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same_gradients, assert_same_run, go, rows, state
from tiny_store import tiny_config, write_store

from foundation.errors import UsageError, WeightsError
from foundation.files import read_sealed, sealed_json
from foundation.training.trainer import Trainer

# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3, 4])
def test_an_interrupted_run_ends_as_the_unbroken_one(
    at: int, store: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def broken(self: Trainer, samples: Any) -> None:
        if self.step == at:
            raise KeyboardInterrupt
        step(self, samples)

    run = tmp_path / "run"
    monkeypatch.setattr(Trainer, "train_step", broken)
    with pytest.raises(KeyboardInterrupt):
        go(tiny_config(store), run)
    assert (run / "last").is_dir() == (at >= 2)
    assert not (run / "model").exists()
    monkeypatch.undo()
    go(tiny_config(store), run)
    assert_same_run(run, unbroken)


@pytest.mark.slow
def test_sigkill_at_any_moment_and_a_resume_equal_the_unbroken_run(
    store: Path, tmp_path: Path
) -> None:
    """A process is killed at odd moments, again and again, until one run comes to its end."""
    stages = [{"steps": 40, "patch_size": 16, "spacing_mm": 4, "batch_size": 2}]
    config = tiny_config(store, stages=stages, save_every=1, validation={"every": 7, "fold": 0})
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = (
        "import json, sys\nfrom foundation.pretraining.run import pretrain\n"
        "config = json.loads(open(sys.argv[1]).read())\n"
        "pretrain(config, output=sys.argv[2], cpu=True, progress=False)\n"
    )
    command_line = [sys.executable, "-c", script, str(tmp_path / "config.json")]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*command_line, str(whole)], check=True)
    kills = 0
    for after in (0.05, 0.31, 0.62, 0.97):
        process = subprocess.Popen([*command_line, str(broken)])
        step = steps_done(broken)
        while process.poll() is None and steps_done(broken) == step:
            time.sleep(0.005)
        time.sleep(after)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    subprocess.run([*command_line, str(broken)], check=True)
    assert_same_run(broken, whole)
    assert (broken / "validation.csv").read_text() == (whole / "validation.csv").read_text()
    best = [run / "best" / "model.safetensors" for run in (broken, whole)]
    assert best[0].read_bytes() == best[1].read_bytes()
    assert {path.name for path in broken.iterdir()} == {path.name for path in whole.iterdir()}


def steps_done(run: Path) -> int:
    try:
        return int(json.loads((run / "last" / "state.json").read_text())["step"])
    except (OSError, ValueError):
        return 0


def test_a_finished_run_trains_no_further(store: Path, unbroken: Path) -> None:
    before = state(unbroken)
    go(tiny_config(store), unbroken)
    after = state(unbroken)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len(rows(unbroken / "log.csv")) == 6


def test_a_run_may_be_made_longer(store: Path, tmp_path: Path) -> None:
    go(tiny_config(store), tmp_path, "stages.1.steps=2")
    go(tiny_config(store), tmp_path, "stages.1.steps=3", "schedule.decay=0.2")
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == ["1", "2", "3", "4", "5"]
    with pytest.raises(UsageError, match="has done 5 steps, more than the 3 asked for"):
        go(tiny_config(store), tmp_path, "stages.1.steps=1")


def test_another_configuration_or_other_data_are_refused(
    store: Path, tmp_path: Path, unbroken: Path
) -> None:
    with pytest.raises(UsageError, match=r"optimizer.learning_rate, seed differ\).*another output"):
        go(tiny_config(store), unbroken, "seed=5", "optimizer.learning_rate=1e-5")
    fewer = write_store(tmp_path / "store", cases=2)
    with pytest.raises(UsageError, match="trained on other data"):
        go(tiny_config(fewer), unbroken)


def test_another_number_of_processes_is_refused(store: Path, tmp_path: Path) -> None:
    go(tiny_config(store), tmp_path, "stages.1.steps=1")
    path = tmp_path / "last" / "state.json"
    progress = {**read_sealed(path.read_text()), "rng": {"seed": 1, "processes": 4}}
    path.write_text(sealed_json(progress))
    with pytest.raises(UsageError, match="by 4 processes and there are 1 now"):
        go(tiny_config(store), tmp_path)


def test_validation_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Held-out cases are of a store"):
        go(tiny_config(sources=[{"kind": "phantoms"}]), tmp_path, "validation.fold=0")


def test_a_damaged_checkpoint_is_named(store: Path, tmp_path: Path) -> None:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "state.json").write_text("{}")
    with pytest.raises(WeightsError, match="cannot be read"):
        go(tiny_config(store), tmp_path)


# --- several processes ----------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def run_processes(count: int, config: dict[str, Any], run: Path) -> None:
    """Train with processes of their own, as torchrun starts them."""
    script = (
        "import json, sys\nfrom foundation.pretraining.run import pretrain\n"
        "pretrain(json.loads(sys.argv[1]), output=sys.argv[2], cpu=True, progress=False)\n"
    )
    command_line = [sys.executable, "-c", script, json.dumps(config), str(run)]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(count):
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment = {**os.environ, **where, **{k: str(v) for k, v in named.items()}}
        environment["OMP_NUM_THREADS"] = "1"
        started.append(subprocess.Popen(command_line, env=environment))
    try:
        assert [process.wait(timeout=300) for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_twice_the_batch(store: Path, tmp_path: Path) -> None:
    stage = {"steps": 1, "patch_size": 16, "spacing_mm": 4, "accumulation": 2}
    validation = {"every": 1, "hold_out": ["03/case_0", "04/case_1", "10_09/case_2"]}
    two, one = tmp_path / "two", tmp_path / "one"
    for count, batch_size, run in ((2, 1, two), (1, 2, one)):
        stages = [{**stage, "batch_size": batch_size}]
        run_processes(count, tiny_config(store, stages=stages, validation=validation), run)
    (theirs,), (ours,) = rows(two / "log.csv"), rows(one / "log.csv")
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        assert bool(theirs[name]) == bool(value)
        assert float(theirs[name] or 0) == pytest.approx(float(value or 0), rel=1e-4), name
    first, second = state(two), state(one)
    assert_same_gradients(first, second)
    for key, tensor in first.items():
        if "optimizer" not in key:  # AdamW's first step is the learning rate in every direction
            torch.testing.assert_close(tensor, second[key], rtol=0, atol=2 * 3e-3)
    (shared,), (alone,) = rows(two / "validation.csv"), rows(one / "validation.csv")
    assert shared["liver"] and shared["spleen"]
    assert float(shared["mean"]) == pytest.approx(float(alone["mean"]), abs=0.02)
