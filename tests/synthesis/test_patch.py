"""Training patches: reproducible, aligned with their labels, honest about what they do not know."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from anatomies import ball, paired_organs
from foundation.synthesis.patch import PatchSettings, Sample, draw_patch

from foundation.imaging.frame import window_hu
from foundation.synthesis import patch as sampler
from foundation.synthesis.anatomy import (
    FINE_MM,
    INDEX,
    LESION_HOSTS,
    Anatomy,
    membership_of,
    phantom_anatomy,
)
from foundation.taxonomy import CLASSES

SETTINGS = PatchSettings(patch_size=24, spacing_mm=4.0, voxels=24**3)
LEFT, RIGHT = INDEX["kidney_left"], INDEX["kidney_right"]


class Still:
    """A random generator whose every draw is its mean: nothing is deformed or shifted."""

    def normal(self, mean: float = 0.0, sd: object = 1.0, size: int | None = None) -> object:
        shape = np.broadcast(np.empty(() if size is None else size), np.asarray(sd)).shape
        return np.full(shape, mean) if shape else mean

    def uniform(self, low: float, high: float) -> float:
        return 0.0


def draw(anatomy: Anatomy, seed: int, settings: PatchSettings = SETTINGS) -> Sample:
    return draw_patch(anatomy, settings, np.random.default_rng(seed))


def dense(sample: Sample, settings: PatchSettings = SETTINGS) -> tuple[torch.Tensor, torch.Tensor]:
    """Target (K, X, Y, Z) and weight (X, Y, Z) of a patch whose every voxel was chosen."""
    shape = (settings.patch_size,) * 3
    order = sample["voxels"].argsort()
    assert sample["voxels"][order].tolist() == list(range(settings.patch_size**3))
    return sample["target"][:, order].view(-1, *shape), sample["weight"][order].view(shape)


def same(first: Sample, second: Sample) -> bool:
    return all(torch.equal(first[name], second[name]) for name in Sample.__annotations__)


@pytest.fixture(scope="module")
def phantom() -> Anatomy:
    return phantom_anatomy(1)


@pytest.mark.parametrize("with_ct", [False, True])
def test_shapes_types_and_ranges(with_ct: bool) -> None:
    settings = replace(SETTINGS, voxels=500)
    sample = draw(paired_organs(with_ct), 0, settings)
    image, target = sample["image"], sample["target"]
    assert image.shape == (2, 24, 24, 24) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1
    assert sample["voxels"].shape == (500,) and int(sample["voxels"].min()) >= 0
    assert int(sample["voxels"].max()) < 24**3
    assert target.shape == (len(CLASSES), 500) and target.dtype == torch.bool
    assert sample["annotated"].shape == (len(CLASSES),)
    assert (sample["weight"] >= 0).all()
    assert not target[~sample["annotated"]].any()


def test_weighted_voxels_estimate_sums_over_all() -> None:
    labels = torch.zeros(20, 20, 20, dtype=torch.uint8)
    labels[5:15, 5:15, 5:15] = 3
    labels[9, 9, 8:12] = 7  # four voxels: a plain draw of 1,000 would hold half a voxel of them
    generator = torch.Generator().manual_seed(0)
    voxels, weight = sampler.draw_voxels(labels, 1000, generator)
    drawn = labels.reshape(-1)[voxels]
    assert (drawn == 7).sum() > 100
    estimated = {v: float(weight[drawn == v].sum()) * 8 for v in (0, 3, 7)}
    truth = {v: int((labels == v).sum()) for v in (0, 3, 7)}
    assert estimated == {v: pytest.approx(truth[v], rel=0.15) for v in truth}
    everything, ones = sampler.draw_voxels(labels, 8000, generator)
    assert everything.tolist() == list(range(8000)) and (ones == 1).all()


def test_a_bump_magnifies_or_shrinks_and_never_folds() -> None:
    line = torch.arange(40, dtype=torch.float32)
    for amount in (-0.8, 0.72):
        positions = torch.stack(torch.meshgrid(line, line, line, indexing="ij"))
        sampler._apply_bump(positions, np.full(3, 20.0), 6.0, amount)
        assert positions[:, 20, 20, 20].tolist() == [20, 20, 20]
        assert (positions[0].diff(dim=0) > 0).all()
        step = float(positions[0, 21, 20, 20] - positions[0, 20, 20, 20])
        assert (step < 0.5) if amount > 0 else (step > 1.5)  # fewer source voxels a step: larger
        assert positions[:, 0, 0, 0].abs().max() < 0.1


def test_a_removed_organ_becomes_fat() -> None:
    names = {1: "fat", 2: "gallbladder", 3: "spleen", 4: "liver"}
    for seed in range(40):
        labels = torch.arange(5, dtype=torch.uint8).repeat(3)
        sampler._remove_organ(labels, names, np.random.default_rng(seed), probability=1.0)
        assert {0, 1, 4} <= set(labels.tolist())
        gone = {2, 3} - set(labels.tolist())
        assert len(gone) <= 1 and (labels == 1).sum() == 3 + 3 * len(gone)


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


def test_gather_takes_the_nearest_voxel_and_fills_outside() -> None:
    volume = torch.arange(4 * 5 * 6, dtype=torch.float32).view(4, 5, 6)
    line = [torch.arange(n, dtype=torch.float32) for n in volume.shape]
    grid = torch.stack(torch.meshgrid(*line, indexing="ij"))
    assert torch.equal(sampler._gather(volume, grid, fill=-1), volume)
    for shift in (0.4, -0.4):
        assert torch.equal(sampler._gather(volume, grid + shift, fill=-1), volume)
    step = torch.tensor([1.0, -1.0, 0.0])[:, None, None, None]
    moved = sampler._gather(volume, grid + step, fill=-1)
    assert torch.equal(moved[:-1, 1:], volume[1:, :-1])
    assert (moved[-1] == -1).all() and (moved[:, 0] == -1).all()


def test_majority_of_fine_labels() -> None:
    fine = torch.zeros(4, 2, 2, dtype=torch.uint8)
    fine[0] = 5  # 4 of 8: a tie
    fine[1, 0, 0] = 5  # now 5 of 8
    fine[2, 1, 1] = 9  # 1 of 8
    assert sampler._majority(fine, 2).flatten().tolist() == [5, 0]
    assert sampler._majority(fine, 1) is fine


def test_an_undeformed_patch_is_a_crop_around_its_centre() -> None:
    shape = (40, 40, 40)
    centre = np.array([22.5, 17.5, 20.5])
    volume = torch.from_numpy(ball(shape, tuple(centre), 8)).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    positions = sampler._deformed_grid(10, 2, 4.0, centre, (), Still(), generator)
    fine = sampler._gather(volume, positions, fill=0)
    assert torch.equal(fine, volume[13:33, 8:28, 11:31])
    coarse = sampler._majority(fine, 2)
    middle = coarse.nonzero().double().mean(0)
    assert middle.tolist() == pytest.approx([4.5, 4.5, 4.5])
    volume_mm3 = int(coarse.sum()) * 4.0**3
    assert volume_mm3 == pytest.approx(4 / 3 * np.pi * (8 * FINE_MM) ** 3, rel=0.1)


def test_deformation_is_a_smooth_change_of_place_and_size() -> None:
    spread = []
    for seed in range(10):
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        positions = sampler._deformed_grid(32, 1, 2.0, np.full(3, 50.0), (), rng, generator)
        steps = positions.diff(dim=1).norm(dim=0)
        smallest, largest = float(steps.min()), float(steps.max())
        assert smallest > 0.3 and largest < 2.5  # no folds, no tears
        spread.append(float(steps.mean()))
        assert (positions.flatten(1).mean(1) - 50).abs().max() < 8
    assert 0.7 < min(spread) < max(spread) < 1.4
    assert max(spread) - min(spread) > 0.1


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


def test_a_lesion_takes_voxels_of_its_organ_only() -> None:
    anatomy = paired_organs()
    before = torch.from_numpy(anatomy.label_map)
    for seed in range(10):
        labels, membership, names = before.clone(), anatomy.membership.copy(), dict(anatomy.names)
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        sampler._grow_lesion(labels, membership, names, anatomy.annotated, 2.0, rng, generator)
        added = dict(names.items() - anatomy.names.items())
        (lesion,) = set(added.values())
        changed = labels != before
        assert set(labels[changed].tolist()) == set(added) and changed.any()
        hosts = [INDEX[host] for host in LESION_HOSTS[lesion]]
        now, was = membership[labels[changed].long()], membership[before[changed].long()]
        assert was[:, hosts].any(1).all() and now[:, INDEX[lesion]].all()
        assert (now[:, hosts] == was[:, hosts]).all()  # each voxel stays its own organ's


def test_a_tumour_of_the_hepatic_vessels_lies_in_the_liver() -> None:
    label_map = np.zeros((48, 48, 48), np.uint8)
    label_map[4:44, 4:44, 4:44] = 1
    label_map[20:28, 20:28, 4:44] = 2
    names = {1: "liver", 2: "hepatic_vessel"}
    annotated = tuple(INDEX[name] for name in ("liver", "hepatic_vessel", "hepatic_vessel_tumor"))
    anatomy = Anatomy("vessels", label_map, names, membership_of(names), annotated, 1.0)
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
    assert (anatomy.membership == untouched.membership).all()
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


def test_window() -> None:
    hu = torch.tensor([-1000.0, -175.0, 37.5, 250.0, 3000.0])
    assert window_hu(hu, [(-175.0, 250.0)])[0].tolist() == [0, 0, 0.5, 1, 1]
