"""Figure 6: which voxels are drawn, their features and both scores, where answers are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_scripts import script

from foundation import UsageError
from foundation.data import Store
from foundation.pretraining import load_config
from foundation.pretraining.network import build_model

pytest.importorskip("sklearn")
figure6 = script("figure6_features")


def voxels(spread: float, scans: int = 4, count: int = 20) -> object:
    """Two classes in each scan, so many standard deviations apart."""
    rng = np.random.default_rng(0)
    classes = np.tile(np.repeat(["liver", "spleen"], count), scans)
    keys = np.repeat([f"scan{i}" for i in range(scans)], 2 * count)
    full = rng.normal(size=(len(classes), 4)).astype(np.float32)
    full[classes == "liver", 0] += spread
    return figure6.Voxels({"full": full, "projected": full[:, 1:]}, classes, keys)


def test_a_voxel_counts_for_the_smallest_of_its_classes(store: Path) -> None:
    case = Store(store).case("04/case_0")
    names = ["spleen", "liver", "liver_tumor"]
    found, labels = figure6.class_map(case, names), case.read_labels()
    for value, names_of_it in enumerate(case.sets):
        expected = {(): -1, ("liver",): 1, ("liver", "liver_tumor"): 2}[names_of_it]
        assert (found[labels == value] == expected).all()
    assert {-1, 1, 2} == set(np.unique(found))


def test_voxels_lie_in_their_patch_and_class() -> None:
    wanted = np.full((20, 9, 12), -1)
    wanted[15:, 4:, :3], wanted[0, 0, 0] = 3, 5
    size = (8, 16, 8)  # more than the scan has along Y
    drawn = list(figure6.patches(wanted, size, 7, seed=1))
    assert [kind for kind, _, _ in drawn] == [3, 5]
    for kind, start, flat in drawn:
        places = np.stack(np.unravel_index(flat, size), axis=1) + start
        assert (wanted[tuple(places.T)] == kind).all()
        assert start[1] == 0 and 0 <= start[0] <= 12 and 0 <= start[2] <= 4
    assert len(drawn[0][2]) == 7 and len(drawn[1][2]) == 1
    again = list(figure6.patches(wanted, size, 7, seed=1))
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(drawn, again, strict=True))


def test_features_are_those_that_the_head_reads(store: Path) -> None:
    config = load_config(
        "unet",
        [
            "model.backbone=lite_unet",
            "model.backbone_options={widths: [8, 16], full: 16}",
            "model.text=one-hot",
            "stages=[{steps: 1, patch_size: 16, spacing_mm: 4}]",
        ],
    )
    model = build_model(config).eval()
    case = Store(store).case("04/case_0")
    found = figure6.collect(model, [case], 5, torch.device("cpu"))
    assert {*found.classes} == {"liver", "liver_tumor"} and {*found.scans} == {"04/case_0"}
    assert found.features["full"].shape == (10, 16)
    assert found.features["projected"].shape == (10, 8)
    # The first patch once more, by hand.
    wanted = figure6.class_map(case, model.classes)
    seed = figure6.zlib.crc32(b"04/case_0")
    kind, start, flat = next(iter(figure6.patches(wanted, (16, 16, 16), 5, seed)))
    hu, _, _ = case.read(start, (16, 16, 16), pad=-1024)
    image = torch.from_numpy(hu).float().add(175).div(425).clamp(0, 1)[None, None]
    with torch.inference_mode():
        full = model.head.normalise(model.backbone.decode(model.features(image)))
        projected = model.head.feature_projection[2](full)
    assert model.classes[kind] == found.classes[0]
    for name, expected in (("full", full), ("projected", projected)):
        by_hand = expected[0].flatten(1)[:, flat].T.numpy()
        np.testing.assert_allclose(found.features[name][:5], by_hand, atol=1e-5)


def test_a_store_of_another_spacing_is_refused(store: Path) -> None:
    changes = ["model.backbone=lite_unet", "model.text=one-hot"]
    changes += ["model.backbone_options={widths: [8, 16], full: 16}"]
    model = build_model(load_config("unet", [*changes, "stages.0.patch_size=16"]))
    with pytest.raises(UsageError, match=r"prepared at 4\.0 mm"):
        figure6.collect(model, [Store(store).case("04/case_0")], 5, torch.device("cpu"))


def test_classes_that_lie_apart_score_high_and_mixed_ones_do_not() -> None:
    found = figure6.scored(voxels(spread=20.0))
    assert found["kNN/full"].shape == (4, 2) and (found["kNN/full"] == 1).all()
    assert found["silhouette/full"].mean() > 0.2  # three of four channels are noise
    mixed = figure6.scored(voxels(spread=0.0))
    assert 0.3 < mixed["kNN/full"].mean() < 0.7 and abs(mixed["silhouette/full"].mean()) < 0.1
    assert 0.3 < found["kNN/projected"].mean() < 0.7, "the channel that tells is not in there"


def test_neighbours_are_sought_in_other_scans() -> None:
    """Features that only tell the scan: with neighbours of the same scan, all would be right."""
    scans = np.repeat(["a", "b"], 20)
    classes = np.where(scans == "a", "liver", "spleen")
    features = np.where(scans == "a", 0.0, 1.0)[:, None]
    assert figure6.neighbours_agree(features, classes, scans).sum() == 0


def test_classes_of_a_single_scan_are_not_scored() -> None:
    given = voxels(spread=5.0)
    given.classes[(given.scans == "scan0") & (given.classes == "liver")] = "aorta"
    assert figure6.scored(given)["kNN/full"].shape == (4, 2)  # liver and spleen
    one = given.scans == "scan0"
    alone = figure6.Voxels(
        {k: v[one] for k, v in given.features.items()}, given.classes[one], given.scans[one]
    )
    with pytest.raises(UsageError, match="Two scans show no class"):
        figure6.scored(alone)


def test_what_is_kept_is_read_again(tmp_path: Path) -> None:
    given = voxels(spread=1.0)
    given.write(tmp_path / "features.npz")
    read = figure6.Voxels.read(tmp_path / "features.npz")
    assert (read.classes == given.classes).all() and (read.scans == given.scans).all()
    assert all(np.array_equal(read.features[s], given.features[s]) for s in figure6.SPACES)
