"""Samples of a run as its configuration describes them."""

from pathlib import Path

from tiny_store import DATASETS, tiny_config, write_store

from foundation.data.store.arrays import Store
from foundation.pretraining.reading import load_config
from foundation.pretraining.sources import batches, build_sources, grid_of
from foundation.training.sample import PatchGrid

WINDOWS = ((-175.0, 250.0), (-1000.0, 1000.0))
CLASSES = ("liver", "spleen")


def test_the_grid_of_a_stage() -> None:
    config = load_config(tiny_config())
    first = grid_of(config, config.stages[0], CLASSES)
    assert first == PatchGrid((16, 16, 16), 8.0, WINDOWS, 1000, CLASSES)


def test_entries_build_their_sources_and_those_of_weight_0_are_left_out(tmp_path: Path) -> None:
    store = Store(write_store(tmp_path))
    config = load_config(tiny_config())
    assert {source.name for source in build_sources(config, store, frozenset())} == set(DATASETS)
    both = [{"kind": "scans", "weight": 0}, {"kind": "phantoms", "count": 1}]
    config = load_config(tiny_config(sources=both))
    (source,) = build_sources(config, store, frozenset())
    assert (source.name, source.weight) == ("phantoms", 1.0)


def test_stages_on_all_cases_draw_from_the_whole_mixture() -> None:
    class Named:
        def __init__(self, name: int) -> None:
            self.name = name

        def sample(self, number: int, grid: PatchGrid) -> dict[str, int]:
            return {"name": self.name}

    config = load_config(tiny_config(validation={"hold_out": ["03"]}), ["stages.1.all_cases=true"])
    whole = Named(1)
    drawn = [
        int(each["name"][0])
        for each in batches(Named(0), config, CLASSES, first_step=0, whole=whole)
    ]
    assert drawn == [0] * config.stages[0].steps + [1] * config.stages[1].steps
