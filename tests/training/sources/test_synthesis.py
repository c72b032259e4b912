"""Training patches: reproducible, aligned with their labels, honest about what they do not know."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from anatomies import harmonised, paired_organs, write_anatomies

from foundation.synthesis.anatomy import Anatomy, phantom_anatomy, sets_of
from foundation.synthesis.lesions import LESION_HOSTS
from foundation.taxonomy import CLASSES, NAMES
from foundation.training.sample import PatchGrid, Sample
from foundation.training.sources import SourceData, SynthesisConfig
from foundation.training.sources.synthesis import Rendered, sample_view

WINDOWS = ((-175.0, 250.0), (-1000.0, 1000.0))
GRID = PatchGrid((24,) * 3, 4.0, WINDOWS, None, NAMES)
INDEX = {name: index for index, name in enumerate(NAMES)}
LEFT, RIGHT = INDEX["kidney_left"], INDEX["kidney_right"]


def draw(anatomy: Anatomy, seed: int, grid: PatchGrid = GRID) -> Sample:
    return sample_view(anatomy, np.random.default_rng(seed), grid)


def dense(sample: Sample, grid: PatchGrid = GRID) -> tuple[torch.Tensor, torch.Tensor]:
    """Target (K, X, Y, Z) and weight (X, Y, Z) of a patch whose every voxel was chosen."""
    shape = grid.size
    order = sample["voxels"].argsort()
    assert sample["voxels"][order].tolist() == list(range(np.prod(shape)))
    return sample["target"][:, order].view(-1, *shape), sample["weight"][order].view(shape)


def same(first: Sample, second: Sample) -> bool:
    return all(torch.equal(first[name], second[name]) for name in Sample.__annotations__)


@pytest.fixture(scope="module")
def phantom() -> Anatomy:
    return phantom_anatomy(1)


@pytest.mark.parametrize("with_ct", [False, True])
def test_shapes_types_and_ranges(with_ct: bool) -> None:
    grid = replace(GRID, voxels=500)
    sample = draw(paired_organs(with_ct), 0, grid)
    image, target = sample["image"], sample["target"]
    assert image.shape == (2, 24, 24, 24) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1
    assert sample["voxels"].shape == (500,) and int(sample["voxels"].min()) >= 0
    assert int(sample["voxels"].max()) < 24**3
    assert target.shape == (len(CLASSES), 500) and target.dtype == torch.bool
    assert sample["annotated"].shape == (len(CLASSES),)
    assert (sample["weight"] >= 0).all()
    assert not target[~sample["annotated"]].any()


def test_the_same_chance_gives_the_same_patch() -> None:
    anatomy = paired_organs()
    assert same(draw(anatomy, 3), draw(anatomy, 3))
    assert not same(draw(anatomy, 3), draw(anatomy, 4))


def test_unknown_voxels_and_scans_without_classes() -> None:
    anatomy = paired_organs(with_ct=True)
    anatomy.unknown = (2,)
    seen = 0
    for seed in range(8):
        target, weight = dense(draw(anatomy, seed))
        seen += int(target[LEFT].sum())
        assert not weight[target[LEFT]].any() and weight.any()
    assert seen
    anatomy.centres = {}  # of a scan in which no annotated class is
    assert draw(anatomy, 2)["weight"].any()


def test_a_scan_and_its_labels_stay_aligned() -> None:
    anatomy = paired_organs(with_ct=True)
    agreement, organs = [], 0
    for seed in range(8):
        sample = draw(anatomy, seed)
        target, weight = dense(sample)
        bright = sample["image"][0] > (50 + 175) / 425  # organs have 200 HU, the rest -100
        inside = target.any(0)
        agreement.append((bright == inside)[weight > 0].double().mean())
        organs += bool(inside.any())
    assert min(agreement) > 0.97
    assert organs >= 5


def test_rendered_organs_stand_out_where_their_targets_are(phantom: Anatomy) -> None:
    values = {name: value for value, name in phantom.names.items()}
    spleen_hu, fat_hu = [], []
    for seed in range(60):
        sample = draw(phantom, seed)
        target, weight = dense(sample)
        spleen = target[INDEX["spleen"]] & (weight > 0)
        hu = sample["image"][1] * 2000 - 1000
        if spleen.sum() > 100:
            around = ~target.any(0) & (weight > 0) & (hu > -200) & (hu < 0)
            spleen_hu.append(float(hu[spleen].median()))
            fat_hu.append(float(hu[around].median()))
    assert len(spleen_hu) >= 5 and "spleen" in values
    assert np.median(spleen_hu) > 20
    assert all(organ > fat for organ, fat in zip(spleen_hu, fat_hu, strict=True))


def test_left_stays_left() -> None:
    both = 0
    for seed in range(12):
        target, _ = dense(draw(paired_organs(), seed))
        if target[LEFT].sum() > 20 and target[RIGHT].sum() > 20:
            both += 1
            left, right = (target[side].nonzero()[:, 0].double().mean() for side in (LEFT, RIGHT))
            assert left < right  # X grows to the patient's right
    assert both >= 4


def test_a_lesions_voxels_belong_to_its_organ(phantom: Anatomy) -> None:
    anatomies = {False: paired_organs(), True: phantom}
    seen = set()
    for seed in range(60):
        target, _ = dense(draw(anatomies[seed % 2 == 0], seed))
        for lesion, hosts in LESION_HOSTS.items():
            voxels = target[INDEX[lesion]]
            if lesion == "hepatic_vessel_tumor" or not voxels.any():  # it has its own test
                continue
            seen.add(lesion)
            assert target[[INDEX[host] for host in hosts]][:, voxels].any(0).all(), lesion
            others = [INDEX[other] for other in LESION_HOSTS if other != lesion]
            assert not target[others][:, voxels].any()
    assert len(seen) >= 4


def test_a_tumour_of_the_hepatic_vessels_lies_in_the_liver() -> None:
    label_map = np.zeros((48, 48, 48), np.uint8)
    label_map[4:44, 4:44, 4:44] = 1
    label_map[20:28, 20:28, 4:44] = 2
    names = {1: "liver", 2: "hepatic_vessel"}
    annotated = ("liver", "hepatic_vessel", "hepatic_vessel_tumor")
    anatomy = Anatomy("vessels", label_map, names, sets_of(names), annotated, 1.0)
    tumours = 0
    for seed in range(24):
        target, _ = dense(draw(anatomy, seed))
        tumour = target[INDEX["hepatic_vessel_tumor"]]
        tumours += bool(tumour.any())
        assert target[INDEX["liver"]][tumour].all()
        assert not target[INDEX["hepatic_vessel"]][tumour].any()
    assert tumours >= 3


def test_lesions_vary_in_size_and_are_not_in_every_patch() -> None:
    sizes = []
    for seed in range(60):
        target, _ = dense(draw(paired_organs(), seed))
        lesions = target[[INDEX["liver_tumor"], INDEX["kidney_tumor"], INDEX["kidney_cyst"]]]
        sizes.append(int(lesions.any(0).sum()))
    assert 0.2 < np.mean(np.array(sizes) > 0) < 0.6
    assert max(sizes) > 5 * min(size for size in sizes if size)


def test_an_anatomy_is_left_as_it_was() -> None:
    anatomy, untouched = paired_organs(), paired_organs()
    for seed in range(12):
        draw(anatomy, seed)
    assert (anatomy.label_map == untouched.label_map).all()
    assert anatomy.sets == untouched.sets
    assert anatomy.names == untouched.names


@pytest.mark.parametrize("with_ct", [False, True])
def test_outside_of_the_field_of_view_is_air_without_weight(with_ct: bool) -> None:
    anatomy = paired_organs(with_ct)
    shares = []
    for seed in range(10):
        sample = draw(anatomy, seed)
        _, weight = dense(sample)
        assert not sample["image"][:, weight == 0].any()  # air is 0 in both windows
        shares.append(float((weight == 0).double().mean()))
    # The label map is 120 mm high, the patch 96 mm: most patches look over its edge.
    assert max(shares) > 0.1 and min(shares) < 0.5


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


def test_synthesis_draws_from_the_store_and_leaves_out_what_is_held_out(tmp_path: Path) -> None:
    organs = ("kidney_left", "kidney_right", "liver")
    case = harmonised(paired_organs().label_map, ("fat", *organs), organs)
    store = write_anatomies(tmp_path, {"one": case, "two": case})
    (source,) = SynthesisConfig().build(SourceData(store, frozenset({"open/two"}), 0))
    assert [anatomy.name for anatomy in source.anatomies] == ["open/one"]
    small = PatchGrid((16,) * 3, 8.0, WINDOWS, 500, ("liver", "spleen"))
    sample = source.draw(np.random.default_rng(0), small)
    assert sample["image"].shape[1:] == (16, 16, 16)
    assert sample["annotated"][0]


def test_a_class_of_ones_own_is_a_target_like_any_other(tmp_path: Path) -> None:
    label_map = paired_organs().label_map
    for ct in (None, np.where(label_map > 1, 200, -100)):
        organs = ("fat", "kidney_left", "my organ", "liver")
        case = harmonised(label_map, organs, ("my organ", "liver"), ct=ct)
        store = write_anatomies(tmp_path / str(ct is None), {"one": case})
        (source,) = SynthesisConfig().build(SourceData(store, frozenset(), 0))
        grid = replace(GRID, classes=("my organ", "liver", "spleen"))
        samples = [source.draw(np.random.default_rng(seed), grid) for seed in range(8)]
        for sample in samples:
            assert sample["annotated"].tolist() == [True, True, False]
            assert not (sample["target"][0] & sample["target"][1]).any()
        assert sum(int(sample["target"][0].sum()) for sample in samples) > 100
