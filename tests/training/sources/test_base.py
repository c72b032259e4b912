"""The register of sources: a kind of one's own is named, read and built like any other."""

import subprocess
import sys

import pytest

from foundation.errors import UsageError
from foundation.training.sources import SOURCES, PhantomsConfig, register_source

OWN = """
from dataclasses import dataclass
from typing import ClassVar, Literal

from foundation.training.sources import SourceData, register_source


@register_source
@dataclass(frozen=True)
class Noise:
    kind: Literal["noise"] = "noise"
    weight: float = 1.0
    spread_hu: float = 10.0
    cubic: ClassVar[bool] = False

    @property
    def name(self):
        return self.kind

    def build(self, data: SourceData):
        return [self]


from foundation.errors import UsageError
from foundation.pretraining.reading import dump, load_config
from foundation.pretraining.sources import build_sources

entry = {"kind": "noise", "spread_hu": 3}
config = load_config({"name": "n", "stages": [{"steps": 1}], "sources": [entry]})
(source,) = build_sources(config, None, frozenset())
print(source.name, source.spread_hu, "spread_hu: 3.0" in dump(config))
try:
    load_config({"name": "n", "stages": [{"steps": 1}], "sources": [{"kind": "nois"}]})
except UsageError as error:
    print(error)
"""


def test_the_kinds_that_come_with_the_package() -> None:
    assert {"phantoms", "scans", "synthesis"} <= set(SOURCES)
    assert all(config.kind == kind for kind, config in SOURCES.items())


def test_a_kind_is_registered_once() -> None:
    with pytest.raises(UsageError, match="'phantoms' is registered already"):
        register_source(PhantomsConfig)


@pytest.mark.slow
def test_a_source_of_ones_own_is_one_class() -> None:
    done = subprocess.run([sys.executable, "-c", OWN], capture_output=True, text=True)
    made, refused = done.stdout.splitlines() or [done.stderr, ""]
    assert made == "noise 3.0 True"
    assert "kind is 'nois'. Did you mean 'noise'? Choose from" in refused
