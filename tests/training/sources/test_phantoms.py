"""Phantoms as a source: another body for each number, made when it is first asked for."""

import numpy as np
import pytest
from anatomies import paired_organs

from foundation.errors import UsageError
from foundation.training.sample import PatchGrid
from foundation.training.sources import PhantomsConfig, Source, SourceData, phantoms

GRID = PatchGrid((16,) * 3, 8.0, ((-175.0, 250.0),), 500, ("liver",))


def source_of(count: int, seed: int) -> Source:
    (source,) = PhantomsConfig(count=count).build(SourceData(None, frozenset(), seed))
    return source


def test_phantoms_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def anatomy(seed: int) -> object:
        made.append(seed)
        return paired_organs()

    monkeypatch.setattr(phantoms, "phantom_anatomy", anatomy)
    source = source_of(count=2, seed=4)
    for seed in range(6):
        source.draw(np.random.default_rng(seed), GRID)
    assert sorted(made) == [4000, 4001]


def test_none_is_refused() -> None:
    with pytest.raises(UsageError, match="count is 0"):
        PhantomsConfig(count=0)
