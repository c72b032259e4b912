"""Samples of a run: what they show, where they are placed, and what they depend on."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from anatomies import harmonised, paired_organs, write_anatomies
from foundation.training.scans import Scans, draw_centre, draw_zoom, resample, rotate, shift
from foundation.training.scans import scan_sources as sources_of
from tiny_store import DATASETS, SPACING_MM, tiny_config, write_store

from foundation.data.store.arrays import Store
from foundation.errors import UsageError
from foundation.pretraining.config import AugmentationConfig, CropConfig, ScansConfig
from foundation.pretraining.reading import load_config
from foundation.taxonomy import NAMES
from foundation.training import mixture as mixing
from foundation.training.mixture import (
    ECHO_APART,
    BatchNumbers,
    Mixture,
    NumberedSample,
    PatchGrid,
    Phantoms,
    Rendered,
    batches,
    build_sources,
    echoed,
    grid_of,
)

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


def test_rendered_sources_follow_the_classes_of_the_run() -> None:
    source = Rendered("synthesis", 1.0, [paired_organs()])
    chosen = PatchGrid((16,) * 3, 8.0, WINDOWS, 600, ("liver", "femur", "kidney_left"))
    everything = PatchGrid((16,) * 3, 8.0, WINDOWS, 600, NAMES)
    few = source.draw(np.random.default_rng(3), chosen)
    all_of_them = source.draw(np.random.default_rng(3), everything)
    assert few["annotated"].tolist() == [True, False, True]
    for row, name in ((0, "liver"), (2, "kidney_left")):
        assert torch.equal(few["target"][row], all_of_them["target"][NAMES.index(name)])
    assert not few["target"][1].any()


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
    sources = sources_of(ScansConfig(), store, frozenset({"03/case_0", "03/case_1"}))
    assert [len(source.cases) for source in sources] == [1, 3, 3]
    for source in sources:
        source.draw = lambda *_: {}  # it is chosen before it draws
    mixture = Mixture(sources, seed=3)
    drawn = [mixture.sample(number, grid(16))["source"] for number in range(600)]
    assert np.bincount(drawn) / 600 == pytest.approx([1 / 3] * 3, abs=0.06)


def test_a_dataset_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(UsageError, match="no scans of dataset 09 to train on; it has 03, 04, 10_"):
        sources_of(ScansConfig(datasets=("03", "09")), store, frozenset())
    with pytest.raises(UsageError, match="needs --store"):
        build_sources(load_config(tiny_config()), None, frozenset())
    synthesis = load_config(tiny_config(sources=[{"kind": "synthesis"}]))
    with pytest.raises(UsageError, match="source of synthesis needs --store"):
        build_sources(synthesis, None, frozenset())


# --- augmentation ---------------------------------------------------------------------------------


def test_a_turn_is_in_the_axial_plane_and_the_same_for_all() -> None:
    volume = torch.arange(4 * 4 * 3).reshape(4, 4, 3)
    always = AugmentationConfig(rotate_probability=1)
    seen = set()
    for seed in range(30):
        turned = rotate(always, (volume, volume + 1, volume + 2), np.random.default_rng(seed))
        (quarters,) = [q for q in range(4) if torch.equal(torch.rot90(volume, q), turned[0])]
        assert torch.equal(turned[1], turned[0] + 1) and torch.equal(turned[2], turned[0] + 2)
        seen.add(quarters)
    assert seen == {1, 2, 3}
    oblong = torch.arange(4 * 2 * 3).reshape(4, 2, 3)
    turned = rotate(always, (oblong,) * 3, np.random.default_rng(0))[0]
    assert torch.equal(turned, oblong.flip(0, 1))


def test_how_often_and_how_much() -> None:
    rng, augmentation = np.random.default_rng(0), AugmentationConfig(zoom_probability=0.3)
    zooms = np.array([draw_zoom(augmentation, rng) for _ in range(2000)])
    assert (zooms > 1).mean() == pytest.approx(0.3, abs=0.04)
    assert zooms[zooms > 1].min() >= 1.3 and zooms.max() <= 1.5
    image = torch.full((2, 1, 1, 1), 0.5)
    shifted = torch.stack([shift(augmentation, image, rng).flatten() for _ in range(2000)])
    changed = shifted[:, 0] != 0.5
    assert float(changed.float().mean()) == pytest.approx(0.2, abs=0.04)
    assert float((shifted - 0.5).abs().max()) <= 0.1
    assert torch.equal(shifted[:, 0], shifted[:, 1])


def test_resampling_keeps_label_values_and_means() -> None:
    hu = torch.arange(8.0).reshape(8, 1, 1).expand(8, 8, 8)
    labels = (hu * 100).to(torch.int32)
    fine, values, inside = resample(hu, labels, labels >= 0, (16, 16, 16))
    assert float(fine.mean()) == pytest.approx(3.5) and fine.shape == (16, 16, 16)
    assert torch.equal(values[:, 0, 0], labels[:, 0, 0].repeat_interleave(2)) and inside.all()
    coarse, values, _ = resample(hu, labels, labels >= 0, (4, 4, 4))
    assert coarse[:, 0, 0].tolist() == [0.5, 2.5, 4.5, 6.5]
    assert set(values.flatten().tolist()) <= set(labels.flatten().tolist())


# --- numbers --------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_and_number_alone(store: Store) -> None:
    sources = sources_of(ScansConfig(), store, frozenset())
    first, second = Mixture(sources, seed=5), Mixture(sources, seed=5)
    other = Mixture(sources, seed=6)
    for number in (9, 3, 7):
        one, same = first.sample(number, grid()), second.sample(number, grid())
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(same[k])) for k in one)
        assert not torch.equal(one["image"], other.sample(number, grid())["image"])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_numbers_in_order(processes: int) -> None:
    parts = [list(BatchNumbers(100, 4, 2, rank, processes)) for rank in range(processes)]
    together = [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]
    assert together == list(BatchNumbers(100, 4, 2 * processes, 0, 1))


def numbers_seen(first_step: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Numbers and spacings of the samples of a run from a step on."""
    seen: list[tuple[int, float]] = []

    class Recorder:
        def sample(self, number: int, grid: PatchGrid) -> dict[str, torch.Tensor]:
            seen.append((number, grid.spacing_mm))
            return {"image": torch.zeros(1)}

    config = load_config(tiny_config(), ["stages.0.accumulation=3"])
    list(batches(Recorder(), config, CLASSES, first_step=first_step))  # type: ignore[arg-type]
    return seen


def test_stages_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = numbers_seen(0, monkeypatch)
    assert [number for number, _ in seen] == list(range(2 * 3 * 2 + 4 * 2))
    assert [spacing for _, spacing in seen] == [8.0] * 12 + [4.0] * 8


@pytest.mark.parametrize("step", range(7))
def test_a_resume_goes_on_with_the_next_number(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done = 6 * min(step, 2) + 2 * max(0, step - 2)
    assert numbers_seen(step, monkeypatch) == numbers_seen(0, monkeypatch)[done:]


@pytest.mark.slow
def test_workers_change_nothing(store: Store) -> None:
    mixture = Mixture(sources_of(ScansConfig(), store, frozenset()), seed=1)
    found = []
    for workers in (0, 2):
        config = load_config(tiny_config(workers=workers))
        found.append(list(itertools.islice(batches(mixture, config, CLASSES, first_step=1), 3)))
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_grid_of_a_stage(store: Store) -> None:
    config = load_config(tiny_config())
    first = grid_of(config, config.stages[0], CLASSES)
    assert first == PatchGrid((16, 16, 16), 8.0, WINDOWS, 1000, CLASSES)
    assert {source.name for source in build_sources(config, store, frozenset())} == set(DATASETS)


def test_synthesis_draws_from_the_store_and_leaves_out_what_is_held_out(tmp_path: Path) -> None:
    organs = ("kidney_left", "kidney_right", "liver")
    case = harmonised(paired_organs().label_map, ("fat", *organs), organs)
    store = write_anatomies(tmp_path, {"one": case, "two": case})
    config = load_config(tiny_config(sources=[{"kind": "synthesis"}]))
    (source,) = build_sources(config, store, frozenset({"open/two"}))
    assert [anatomy.name for anatomy in source.anatomies] == ["open/one"]
    sample = source.draw(np.random.default_rng(0), grid(16, 8.0, 500))
    assert sample["image"].shape[1:] == (16, 16, 16)
    assert sample["annotated"][CLASSES.index("liver")]


def test_phantoms_are_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[int] = []

    def anatomy(seed: int) -> object:
        made.append(seed)
        return paired_organs()

    monkeypatch.setattr(mixing, "phantom_anatomy", anatomy)
    source = mixing.Phantoms("phantoms", 1.0, count=2, seed=4)
    for seed in range(6):
        source.draw(np.random.default_rng(seed), grid(16, 8.0, 500))
    assert sorted(made) == [4000, 4001]


@pytest.mark.parametrize("echo", [1, 2, 3])
def test_each_sample_is_given_so_often_and_never_soon_again(echo: int) -> None:
    numbers = 5 * ECHO_APART * echo
    drawn = [echoed(number, echo) for number in range(numbers)]
    places: dict[int, list[int]] = {}
    for number, sample in enumerate(drawn):
        places.setdefault(sample, []).append(number)
    assert sorted(places) == list(range(5 * ECHO_APART)), "none is left out"
    assert all(np.diff(found).tolist() == [ECHO_APART] * (echo - 1) for found in places.values())


def test_echoes_are_the_same_samples_and_are_drawn_once() -> None:
    made: list[int] = []

    class Counting(Mixture):
        def sample(self, number: int, grid: PatchGrid) -> NumberedSample:
            made.append(number)
            return super().sample(number, grid)

    mixture = Counting([Phantoms("phantoms", 1, 1, 3)], seed=5)
    config = load_config(
        {
            "name": "echo",
            "sources": [{"kind": "phantoms"}],
            "stages": [{"steps": 3 * ECHO_APART, "patch_size": 8, "batch_size": 1}],
            "loss": {"sample_voxels": 32},
            "echo": 2,
            "workers": 0,
        }
    )
    images = [each["image"] for each in batches(mixture, config, NAMES, first_step=0)]
    assert made == list(range(2 * ECHO_APART)), "the last block is heard once"
    assert torch.equal(images[3], images[3 + ECHO_APART])
    assert not torch.equal(images[3], images[4])
    resumed = batches(mixture, config, NAMES, first_step=ECHO_APART + 3)
    assert torch.equal(next(resumed)["image"], images[ECHO_APART + 3])
