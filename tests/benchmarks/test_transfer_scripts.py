"""What the scripts of new classes and tasks decide by themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
from conftest import REPOSITORY

from foundation.errors import UsageError
from foundation.evaluation import Score, Scores
from foundation.tuning import METHODS, TASKS

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    before = set(sys.modules)
    names = ("continual", "class_from_prompt", "table6_transfer")
    yield {name: import_module(name) for name in names}
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_steps_are_read(scripts: dict[str, ModuleType]) -> None:
    continual = scripts["continual"]
    assert continual.steps_of("a+b, c") == [["a", "b"], ["c"]]
    for wrong in ("a,,b", "a+", "a,b+a"):
        with pytest.raises(UsageError, match="give each class once"):
            continual.steps_of(wrong)


def test_every_method_takes_the_same_number_of_steps(scripts: dict[str, ModuleType]) -> None:
    continual = scripts["continual"]
    for name, (method, _) in continual.METHODS.items():
        settings = continual.settings_of(name, 60, 120)
        assert settings["steps"] + settings.get("probe", 0) == 180, name
        METHODS[method](**settings)  # a setting that the method does not have is an error


def test_forgetting_and_learning_are_measured_apart(scripts: dict[str, ModuleType]) -> None:
    rows = [Score(f"c{i}", name, value) for i in range(4) for name, value in
            (("liver", 0.8), ("aorta", 0.6), ("sacrum", 0.2))]  # fmt: skip
    scores = Scores(tuple(rows), None)
    old, added = scripts["continual"].figures(scores, ["liver", "aorta"], ["sacrum"], 2)
    assert (old.name, added.name) == ("dice/old 2", "dice/added 2")
    assert old.value == pytest.approx(0.7) and added.value == pytest.approx(0.2)
    (only,) = scripts["continual"].figures(scores, ["liver"], [], 0)
    assert only.name == "dice/old 0"


def test_every_question_has_its_arms(scripts: dict[str, ModuleType]) -> None:
    script = scripts["class_from_prompt"]
    full = {"start": "weights", "embedding": "text", "method": "full", "scans": 5}
    every = {**full, "method": "all"}
    asked = [full, every, {**every, "start": "scratch"}, {**full, "embedding": "one-hot"}]
    asked += [{**full, "method": method} for method in script.METHODS]
    assert all(script.wanted(arm, True) for arm in asked)
    assert not script.wanted({**full, "embedding": "one-hot"}, False), "no such weights are given"
    assert not script.wanted({**full, "start": "scratch", "method": "lora"}, True)
    METHODS["full"](**script.ALL)


def test_the_tasks_and_numbers_of_scans(scripts: dict[str, ModuleType]) -> None:
    script = scripts["table6_transfer"]
    found = SimpleNamespace(splits={"train": ["s"] * 64})

    def lab(shots: list[str] | None) -> SimpleNamespace:
        given = SimpleNamespace(start=["a", "b"], tasks=["ribs"], heads=["text"], shots=shots)
        return SimpleNamespace(generated=False, given=given, plan=script.PLANS["real"])

    axes = script.axes_of(lab(None), found)
    assert axes["scans"] == ["1", "5", "10", "20", "64", "all"]
    assert axes["start"] == ["a", "a untrained", "b", "b untrained"]
    for wrong in ("0", "few"):
        with pytest.raises(UsageError, match=f"--shots {wrong}"):
            script.axes_of(lab([wrong]), found)
    assert {task: len(script.classes_of(task, 1)) for task in TASKS} == {
        "organs": 17, "vertebrae": 24, "cardiac": 18, "muscles": 21, "ribs": 24
    }  # fmt: skip
    assert len(script.classes_of("structures", 1)) == 12
