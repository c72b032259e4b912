"""Each fault is injected, and the doctor names it."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from foundation.cli.main import main
from foundation.hub import doctor
from foundation.hub.cards import Card, read_card

GIB = 1 << 30
WEIGHTS = read_card("universal-ct").folder


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the golden case gives, without a network: what it must give."""
    found: dict[str, float] = json.loads((WEIGHTS / doctor.GOLDEN).read_text())["volumes_ml"]
    monkeypatch.setattr(doctor, "golden_volumes_ml", lambda: found)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return found


@pytest.fixture
def examined(golden: dict[str, float]) -> Callable[[], dict[str, doctor.Check]]:
    return lambda: {check.name: check for check in doctor.examine()}


Examined = Callable[[], dict[str, doctor.Check]]


def test_a_sound_machine_has_no_failure(
    examined: Examined, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not [check for check in examined().values() if check.status == "failed"]
    assert main(["doctor"]) == 0
    assert "ok     weights: universal-ct: all files have their SHA-256" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert {"name", "status", "text"} == set(json.loads(capsys.readouterr().out)[0])


def test_a_faulty_torch(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.9.1+cpu")
    check = examined()["versions"]
    assert check.status == "failed" and "2.9.1" in check.text and "pip install" in check.text


@pytest.mark.parametrize(
    ("cores", "threads", "words"), [(2, 8, "OMP_NUM_THREADS=2"), (4, 1, "unset OMP_NUM_THREADS")]
)
def test_threads_that_do_not_suit_the_cores(
    examined: Examined, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, words: str
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    check = examined()["processor"]
    assert check.status == "doubt" and words in check.text


def test_little_memory_and_a_full_disk(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_available_bytes", lambda: GIB)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=GIB // 10))
    found = examined()
    assert found["memory"].status == found["disk"].status == "doubt"
    assert "1.0 GiB available" in found["memory"].text and "0.1 GiB free" in found["disk"].text


def test_a_cache_that_cannot_be_written(
    examined: Examined, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "closed"))
    monkeypatch.setattr("os.access", lambda path, _: tmp_path not in (path, *Path(path).parents))
    check = examined()["caches"]
    assert check.status == "doubt" and str(tmp_path / "closed") in check.text


def test_a_hub_that_does_not_answer(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "HF_HUB_OFFLINE" in examined()["Hub"].text
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        check = examined()["Hub"]
    assert check.status == "doubt" and endpoint in check.text


def test_damaged_weights(
    examined: Examined,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr(Card, "folder", property(lambda _: folder))
    assert examined()["weights"].status == "ok"
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    check = examined()["weights"]
    assert check.status == "failed" and "model.safetensors is damaged" in check.text
    assert main(["doctor", "-q"]) == 1
    assert "failed weights: " in capsys.readouterr().out


def test_a_machine_that_computes_something_else(
    examined: Examined, golden: dict[str, float]
) -> None:
    golden["liver"] *= 1.05
    check = examined()["golden case"]
    assert check.status == "failed" and "liver 3127 ml in place of 2978 ml" in check.text


@pytest.mark.slow
def test_the_embedded_weights_give_the_golden_volumes() -> None:
    assert doctor._golden()[0] == "ok"
