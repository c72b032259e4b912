"""The count of false alarms counts what it says."""

import sys
from pathlib import Path

import numpy as np
import pytest
from benchmark_scripts import script

from foundation.evaluation import read_records

false_alarms = script("false_alarms")


def test_false_alarms_and_faults_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that doubts every volume of an odd number of slices."""
    record = tmp_path / "record.jsonl"
    arguments = [
        "--count",
        "2",
        "--first-seed",
        "2",
        "--spacing",
        "9",
        "9",
        "--record",
        str(record),
    ]
    monkeypatch.setattr(sys, "argv", ["false_alarms.py", *arguments])
    seen: list[bool] = []

    def doubted(hu: np.ndarray, _: np.ndarray) -> bool:
        seen.append(bool(hu.shape[2] % 2))
        return seen[-1]

    monkeypatch.setattr(false_alarms, "doubted", doubted)
    false_alarms.main()
    (found,) = read_records(record)
    figures = {each.name: each for each in found.figures}
    faults = len(false_alarms.FAULTS)
    looks = [*seen[:2], *seen[2 + faults : 4 + faults]]  # two of each body, before its faults
    assert figures["false_alarms"].n == 4
    assert figures["false_alarms"].value == 100 * sum(looks) / 4
    assert figures["found/intercept applied twice"].value == 100 * (seen[2] + seen[4 + faults]) / 2
    assert set(figures) >= {f"found/{fault}" for fault in false_alarms.FAULTS}


def test_normal_views_are_doubted_by_nothing_and_faults_by_something() -> None:
    from foundation.synthesis import generate, render_ct

    rng = np.random.default_rng(50)
    body = generate(50, 8.0)
    hu = np.rint(render_ct(body.label_map, body.names, 8.0, rng)).astype(np.int16)
    doubted = {
        name: false_alarms.doubted(change(hu, rng), body.affine)
        for name, change in {**false_alarms.NORMAL, **false_alarms.FAULTS}.items()
    }
    assert not any(doubted[name] for name in false_alarms.NORMAL)
    assert all(doubted[name] for name in false_alarms.FAULTS)
