"""Patches of a few scans: what is turned and stretched stays in register with its labels."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from foundation.imaging.bits import pack
from foundation.training.sample import PatchGrid
from foundation.tuning import samples
from foundation.tuning.samples import FewScans

SHAPE = (24, 20, 22)


class Ramp:
    """A scan whose HU are ten times its label values, which are all different along each axis."""

    key, shape, spacing_mm, unknown, annotated = "d/ramp", SHAPE, 2.0, (), ("bone",)
    centres: ClassVar[dict[str, NDArray[np.int64]]] = {"bone": np.array([[12, 10, 11]])}

    def read(self, start: list[int], size: list[int]) -> tuple[NDArray, NDArray, NDArray]:
        places = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), -1)
        values = 1 + places.sum(-1)
        full = np.zeros(size, int)
        inside = np.zeros(size, bool)
        low = [max(0, s) for s in start]
        high = [min(n, s + k) for s, k, n in zip(start, size, SHAPE, strict=True)]
        source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        target = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        full[target], inside[target] = values[source], True
        return (10 * full).astype(np.int16), full, inside

    def membership(self, names: tuple[str, ...]) -> NDArray[np.bool_]:
        return np.tile(np.arange(256)[:, None] > 20, (1, len(names)))


@pytest.fixture
def plain_contrast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(samples, "vary", lambda hu, *_: hu)
    yield


def grid(n: int = 8) -> PatchGrid:
    return PatchGrid((n, n, n), 2.0, ((-1000.0, 1000.0),), None, ("bone",))


@pytest.mark.usefixtures("plain_contrast")
def test_grey_values_and_labels_are_turned_alike() -> None:
    scans = FewScans([Ramp()], ("bone",))  # type: ignore[list-item]
    turned = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        patch = scans.patch(rng, torch.Generator().manual_seed(0), grid())
        turned += patch.lattice is not None
        here = patch.known
        assert here.float().mean() > 0.2
        # A label is of the nearest voxel, up to half a voxel away along each of three axes.
        assert (patch.hu / 10 - patch.labels)[here].abs().max() <= 1.5 + 1e-3
    assert 15 < turned < 30


@pytest.mark.usefixtures("plain_contrast")
def test_masks_of_the_old_model_are_turned_with_the_scan() -> None:
    case = Ramp()
    _, values, _ = case.read([0, 0, 0], list(SHAPE))
    mask = values > 30
    bits = {case.key: {"old": pack(mask)}}
    scans = FewScans([case], ("bone",), pseudo=bits)  # type: ignore[list-item]
    wide = PatchGrid((8, 8, 8), 2.0, ((-1000.0, 1000.0),), None, ("old", "bone"))
    seen = 0
    for seed in range(20):
        sample = scans.draw(np.random.default_rng(seed), wide)
        known = sample["weight"] > 0
        # HU are 10 times the label; the window maps [-1000, 1000] to [0, 1]. `bone` comes first.
        label = (sample["image"][0].reshape(-1)[sample["voxels"]] * 2000 - 1000) / 10
        assert not (sample["target"][0] & sample["target"][1]).any()
        clear = known & ((label < 18) | (label > 33))
        assert not sample["target"][0][clear & (label < 18)].any()
        seen += int(sample["target"][1][clear & (label > 33)].sum())
    assert seen > 0
