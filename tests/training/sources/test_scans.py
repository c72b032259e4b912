"""Crops of prepared scans: what they show and where they are placed."""

import numpy as np
import pytest
import torch
from tiny_store import SPACING_MM, write_store

from foundation.data.store.arrays import Store
from foundation.errors import UsageError
from foundation.training.augment import AugmentationConfig
from foundation.training.mixture import Mixture
from foundation.training.sample import PatchGrid
from foundation.training.sources import ScansConfig, Source, SourceData, SynthesisConfig
from foundation.training.sources.scans import CropConfig, Scans, draw_centre

PLAIN = AugmentationConfig(rotate_probability=0, shift_probability=0)
WINDOWS = ((-175.0, 250.0), (-1000.0, 1000.0))
CLASSES = ("liver", "spleen", "liver_tumor")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(write_store(tmp_path_factory.mktemp("store")))


def grid(size: int = 16, spacing_mm: float = SPACING_MM, voxels: int | None = None) -> PatchGrid:
    return PatchGrid((size,) * 3, spacing_mm, WINDOWS, voxels, CLASSES)


def scans(store: Store, key: str, **options: object) -> Scans:
    given = {"crops": CropConfig(), "augmentation": PLAIN, **options}
    return Scans(key.split("/")[0], 1.0, [store.case(key)], **given)


def sources_of(
    store: Store, held_out: frozenset[str] = frozenset(), **options: tuple[str, ...]
) -> list[Source]:
    return ScansConfig(**options).build(SourceData(store, held_out, 0))


# --- what a sample shows --------------------------------------------------------------------------


def test_a_sample_shows_the_scan_and_its_labels(store: Store) -> None:
    sample = scans(store, "04/case_0").draw(np.random.default_rng(0), grid())
    assert sample["image"].shape == (2, 16, 16, 16)
    assert torch.equal(sample["voxels"], torch.arange(16**3))
    assert sample["annotated"].tolist() == [True, False, True]
    liver, spleen, tumour = sample["target"]
    assert liver.any() and not spleen.any()
    assert not (tumour & ~liver).any(), "a tumour's voxels are its organ's too"
    # HU of 110 in the liver, of 30 in the tumour, back from the window.
    hu = sample["image"][0].reshape(-1) * 425 - 175
    assert float(hu[liver & ~tumour].mean()) == pytest.approx(110, abs=5)
    assert (sample["weight"] == 1).all()


def test_unknown_voxels_and_those_outside_have_no_weight(store: Store) -> None:
    case = store.case("03/case_2")
    everything = scans(store, case.key).draw(np.random.default_rng(0), grid(32))
    weight = everything["weight"].view(32, 32, 32)
    inside = [(32 - size) // 2 for size in case.shape]
    body = weight[
        inside[0] : inside[0] + case.shape[0],
        inside[1] : inside[1] + case.shape[1],
        inside[2] : inside[2] + case.shape[2],
    ]
    assert not body[..., :4].any() and (body[..., 4:] == 1).all()
    assert float(weight.sum()) == float(body.sum()), "around the scan nothing counts"
    assert everything["image"][1].view(32, 32, 32)[0, 0, 0] == 0  # air


def test_a_coarser_grid_shows_more(store: Store) -> None:
    sample = scans(store, "10_09/case_0").draw(np.random.default_rng(1), grid(16, 8.0))
    spleen = sample["target"][1].view(16, 16, 16)
    stored = store.case("10_09/case_0")
    voxels = np.isin(stored.read_labels(), 1).sum()
    assert int(spleen.sum()) == pytest.approx(voxels / 8, rel=0.35)
    assert sample["weight"].sum() < 16**3  # the scan ends within the patch


def test_a_sample_of_the_voxels(store: Store) -> None:
    sample = scans(store, "04/case_0").draw(np.random.default_rng(0), grid(voxels=500))
    whole = scans(store, "04/case_0").draw(np.random.default_rng(0), grid())
    assert sample["voxels"].shape == sample["weight"].shape == (500,)
    assert torch.equal(sample["image"], whole["image"])
    assert torch.equal(sample["target"], whole["target"][:, sample["voxels"]])


# --- where it is placed ---------------------------------------------------------------------------


def kinds(store: Store, key: str, crops: CropConfig, draws: int = 600) -> dict[str, float]:
    """Share of the centres that lie in no class, in the organ alone, in the tumour."""
    case, rng = store.case(key), np.random.default_rng(0)
    membership = case.membership(CLASSES)[case.read_labels()]
    found = {"background": 0, "organ": 0, "tumor": 0}
    for _ in range(draws):
        centre = draw_centre(case, crops, rng)
        liver, _, tumour = membership[tuple(centre.astype(int))]
        found["tumor" if tumour else "organ" if liver else "background"] += 1
    return {name: count / draws for name, count in found.items()}


def test_crops_of_foreground_to_background(store: Store) -> None:
    shares = kinds(store, "03/case_0", CropConfig(background=1, foreground=2))
    assert shares["organ"] == pytest.approx(2 / 3, abs=0.06)


def test_crops_of_background_organ_and_tumour(store: Store) -> None:
    ratio = CropConfig(background=1, foreground=0, organ=1, tumor=5)
    shares = kinds(store, "04/case_0", ratio)
    # Centres of the organ lie in the tumour where the tumour does: its voxels are the liver's.
    assert shares["background"] == pytest.approx(1 / 7, abs=0.05)
    assert shares["tumor"] >= 5 / 7 - 0.05
    without = kinds(store, "03/case_0", ratio)
    assert without["organ"] == pytest.approx(1 / 2, abs=0.06) and without["tumor"] == 0


def test_datasets_are_drawn_alike_and_cases_by_weight(store: Store) -> None:
    sources = sources_of(store, held_out=frozenset({"03/case_0", "03/case_1"}))
    assert [len(source.cases) for source in sources] == [1, 3, 3]
    for source in sources:
        source.draw = lambda *_: {}  # it is chosen before it draws
    mixture = Mixture(sources, seed=3)
    drawn = [mixture.sample(number, grid(16))["source"] for number in range(600)]
    assert np.bincount(drawn) / 600 == pytest.approx([1 / 3] * 3, abs=0.06)


def test_a_dataset_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(UsageError, match="no scans of dataset 09 to train on; it has 03, 04, 10_"):
        sources_of(store, datasets=("03", "09"))
    for config in (ScansConfig(), SynthesisConfig()):
        with pytest.raises(UsageError, match=f"source of {config.kind} needs --store"):
            config.build(SourceData(None, frozenset(), 0))
