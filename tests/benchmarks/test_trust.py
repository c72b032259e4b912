"""The expected Dice: pairs of estimate and truth become a calibration beside the weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_scripts import script
from tiny import tiny_model

from foundation import from_pretrained
from foundation.evaluation import read_records
from foundation.hub.saved import save_pretrained
from foundation.synthesis import generate

trust = script("trust")


def test_a_run_measures_calibrates_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_pretrained(tiny_model(), tmp_path / "model")
    measured = []

    def measure(_: Any, seed: int) -> list[dict[str, Any]]:
        measured.append(seed)
        rng = np.random.default_rng(seed)
        own = float(rng.uniform(0.5, 1))
        dice = float(np.clip(own - 0.2 + rng.normal(0, 0.02), 0, 1))
        return [{"scan": f"phantom {seed}", "class": "liver", "own": own, "dice": dice}]

    monkeypatch.setattr(trust, "measure", measure)
    out, record = tmp_path / "out", tmp_path / "records.jsonl"
    words = ["-m", str(folder), "-o", str(out), "--into", str(folder), "--record", str(record)]
    for count in (40, 240):
        monkeypatch.setattr(sys, "argv", ["trust.py", *words, "--count", str(count)])
        trust.main()
    assert measured == [*range(5000, 5240)], "what was measured is not measured again"
    figures = {each.name: each for each in read_records(record)[-1].figures}
    assert figures["rank correlation/phantoms"].n == 240
    assert (figures["rank correlation/phantoms"].value or 0) > 0.95
    assert 75 <= (figures["within the interval/phantoms"].value or 0) <= 100
    expected = from_pretrained(folder).calibration.expected("liver", 0.8)
    assert expected[0] == pytest.approx(0.6, abs=0.02)
    assert "trust.json" in capsys.readouterr().out


def test_an_organ_of_a_phantom_holds_its_lesions() -> None:
    for seed in range(40):
        body = generate(seed, 8.0)
        tumour = body.mask("kidney_tumor")
        if tumour.any():
            break
    sides = [trust.truth_of(body, f"kidney_{side}") for side in ("right", "left")]
    assert (sides[0] | sides[1])[tumour].all() and not (sides[0] & sides[1]).any()
    assert any((body.mask(f"kidney_{side}") & own).any() and own[tumour].all()
               for side, own in zip(("right", "left"), sides, strict=True))  # fmt: skip
    assert trust.truth_of(body, "kidney_tumor").sum() == tumour.sum()
    assert trust.truth_of(body, "intestine").any()
