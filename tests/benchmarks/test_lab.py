"""An output belongs to one experiment: other data, weights or settings are refused, never mixed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_scripts import script

from foundation import UsageError
from foundation.evaluation import Figure


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    return {name: script(name) for name in ("runs", "sizes", "lab")}


def opened(modules: dict[str, ModuleType], folder: Path, *words: str, **options: Any) -> Any:
    """A lab that reads no data, by its command line."""

    def add(parser: Any) -> None:
        modules["lab"].add_model(parser)
        parser.add_argument("--arms", nargs="+")

    sizes = modules["sizes"].plans()
    given = [*words, "-o", str(folder)]
    return modules["lab"].Lab.parse("", sizes, add, given, reads_data=False, **options)


def measured(_: Any) -> Iterable[Figure]:
    return [Figure("dice/mean", 0.5)]


def test_a_folder_of_other_arguments_is_refused(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    opened(modules, tmp_path, "--mini")
    opened(modules, tmp_path, "--mini", "--seeds", "7", "--only", "text=a", "--publish")
    for words in (["--set", "ema=0.9"], ["--max-steps", "3"], ["-m", "other"], ["--arms", "b"]):
        with pytest.raises(UsageError, match=f"differs in --{words[0].lstrip('-')[:3]}"):
            opened(modules, tmp_path, "--mini", *words)
    arms = tmp_path / "arms"
    opened(modules, arms, "--mini", axes=["arms"])
    opened(modules, arms, "--mini", "--arms", "b", axes=["arms"])


def test_a_record_of_other_weights_or_data_is_not_taken_for_this_ones(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    lab = opened(modules, tmp_path, "--mini")
    arm, ours, theirs = {"text": "a"}, {"w": "a" * 64}, {"w": "b" * 64}
    lab.measure(arm, measured, seeds=[1], weights=ours)
    lab.measure(arm, measured, seeds=[1], weights=ours)
    assert len(lab.records()) == 1, "what is done is done once"
    with pytest.raises(UsageError, match="with other weights"):
        lab.measure(arm, measured, seeds=[1], weights=theirs)
    lab.data.hashes = theirs
    with pytest.raises(UsageError, match="with other data"):
        lab.measure(arm, measured, seeds=[1], weights=ours)


def test_a_record_has_the_commit_with_which_the_run_began(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    lab = opened(modules, tmp_path, "--mini")
    lab.commit = "a" * 40
    lab.measure({"text": "a"}, measured, seeds=[1])
    assert lab.records()[0].commit == "a" * 40


def test_no_two_arms_share_their_files(modules: dict[str, ModuleType]) -> None:
    slug = modules["runs"].slug
    texts = ("A CT of a {}", "A CT of a {}!", "A CT, of a {}", "one-hot", "two words")
    assert len({slug({"prompt": text}) for text in texts}) == len(texts)
    assert slug({"prompt": "one-hot"}) == "one-hot" and slug({}) == "only"
    assert slug({"prompt": "two words"}) == "two_words"
