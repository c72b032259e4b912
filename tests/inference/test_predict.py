"""Segmenting a CT with a network that thresholds HU: physics goes in, millilitres come out."""

import csv
import json
import sys
import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from thresholds import ABOVE_HU, WINDOW, ThresholdNetwork
from torch import Tensor, nn

from foundation.config import ClassSpec, ModelConfig, Preprocessing, TextSpec
from foundation.errors import UsageError, VolumeError, WeightsError
from foundation.imaging.expected_dice import Calibration
from foundation.imaging.probabilities import QUANTA
from foundation.imaging.sidecar import Sidecar
from foundation.imaging.trust import Trust
from foundation.imaging.volumes import VolumeWarning, read_ct
from foundation.inference import predict
from foundation.inference.predict import choose_device, segment_volume
from foundation.inference.sliding_window import (
    SlabAccumulator,
    collect,
    importance_map,
    slide,
    window_size,
    window_starts,
)
from foundation.model import UniversalModel
from foundation.taxonomy import CLASSES

CPU = torch.device("cpu")

network = ThresholdNetwork


def ball_ct(radius_mm: float = 22.0, affine: np.ndarray | None = None, shape=(61, 50, 33)):
    """A bright ball (300 HU) with a core (600 HU) in soft tissue (0 HU), in air.

    Partial volumes at the surface are exact to 1/27, as in a real CT.
    """
    affine = oblique_lps() if affine is None else affine
    centre = (np.array(shape) - 1) / 2 + [3.2, -2.4, 1.1]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)

    def inside(radius: float, offset=(0.0, 0.0, 0.0)) -> np.ndarray:
        share = np.zeros(shape)
        steps = (-1 / 3, 0, 1 / 3)
        for shift in np.array(np.meshgrid(steps, steps, steps)).reshape(3, -1).T:
            grid = np.moveaxis(np.indices(shape), 0, -1) + shift - centre
            share += np.linalg.norm(grid * spacing - offset, axis=-1) <= radius
        return share / 27

    body = np.zeros(shape)
    body[6:-6, 4:-4, :] = 1  # air at both sides, so that the body's middle is known
    hu = -1000 + 1000 * body + 300 * inside(radius_mm) + 300 * inside(radius_mm / 2)
    return hu.astype(np.float32), affine


def oblique_lps() -> np.ndarray:
    angle = np.deg2rad(12)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.3, -1.6, 2.5])
    affine[:3, 3] = [40, -55, 900]
    return affine


def segment(ct, net=None, **options):
    options = {"progress": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*(no CT of a body|no body was found)")
        return segment_volume(net or network(), ct, **options)


def ball_ml(radius_mm: float) -> float:
    return 4 / 3 * np.pi * radius_mm**3 / 1000


# --- values that are not finite ------------------------------------------------------------------


class Broken(ThresholdNetwork):
    """Gives `value` as one logit of one window, all others as they should be."""

    def __init__(self, value: float, window: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.value, self.window, self.kind = value, window, dtype

    def forward(self, image: Tensor, channels=None) -> Tensor:
        logits = super().forward(image, channels)
        if len(self.encoded) == self.window + 1:
            logits[0, 0, 5, 5, 5] = self.value
        return logits.to(self.kind)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_an_error_and_not_nothing_found(value):
    for window in (0, 1):
        with pytest.raises(WeightsError, match="computed NaN or infinity, so its masks would be"):
            segment(ball_ct(), Broken(value, window))


def test_an_overflow_in_half_precision_is_an_error():
    assert segment(ball_ct(), Broken(6e4, dtype=torch.float16)).volumes_ml["liver"] > 0
    with pytest.raises(WeightsError, match="NaN or infinity"):
        segment(ball_ct(), Broken(7e4, dtype=torch.float16))  # 65,504 is the largest


def test_huge_values_that_are_finite_are_none():
    """Their sum over a slab overflows."""
    assert segment(ball_ct(), Broken(3e38)).volumes_ml["liver"] > 0


def test_a_softmax_with_nan_is_an_error():
    net = Broken(float("nan"))
    net.config = replace(net.config, activation="softmax")
    levels = torch.cat([net.levels[:1], net.levels])
    net.forward = lambda image, channels=None: Broken.forward(net, image)  # background and all
    net.levels = levels
    with pytest.raises(WeightsError, match="NaN or infinity"):
        segment(ball_ct(), net)


def test_a_network_that_cannot_compute_says_so():
    class Wrong(ThresholdNetwork):
        def forward(self, image, channels=None):
            return nn.functional.conv3d(image, torch.zeros(1, 2, 3, 3, 3))

    with pytest.raises(
        WeightsError, match=r"'threshold' cannot compute a window of \(32, 32, 32\)"
    ):
        segment(ball_ct(), Wrong())


def test_a_spacing_that_takes_all_memory_is_refused_before_it_does(monkeypatch):
    monkeypatch.setattr("foundation.imaging.memory.available_bytes", lambda: 10**8)
    with pytest.raises(VolumeError, match=r"at the network's 0\.1 × 0\.1 × 0\.1 mm needs about 2"):
        segment(ball_ct(), network(spacing_mm=(0.1, 0.1, 0.1)))


# --- physics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SPL", "PIR"])
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.5, 2.0), (2.0, 2.0, 2.0)])
def test_a_ball_keeps_its_place_and_volume(tmp_path, codes, spacing_mm):
    image = nib.Nifti1Image(*ball_ct())
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
    )
    image = image.as_reoriented(turn)
    nib.save(image, tmp_path / "ct.nii.gz")
    result = segment(tmp_path / "ct.nii.gz", network(spacing_mm=spacing_mm))
    assert result.volumes_ml["liver"] == pytest.approx(ball_ml(22), rel=0.02)
    # Voxels of 2 mm average away a little of so curved a surface.
    assert result.volumes_ml["liver_tumor"] == pytest.approx(ball_ml(11), rel=0.04)
    mask = result.mask("liver")
    assert mask.shape == image.shape and mask.dtype == bool
    expected = image.get_fdata() > 150
    dice = 2 * (mask & expected).sum() / (mask.sum() + expected.sum())
    assert dice > 0.97
    centre, true = (np.argwhere(m).mean(axis=0) for m in (mask, expected))
    assert np.abs(centre - true).max() < 0.1


class Directed(ThresholdNetwork):
    """Sees where in its window a voxel lies: the mask is the half towards the first axis' start."""

    def forward(self, image: Tensor, channels=None) -> Tensor:
        self.encoded.append(tuple(image.shape))
        ramp = torch.linspace(1, -1, image.shape[2]).view(1, 1, -1, 1, 1)
        count = len(ABOVE_HU) if channels is None else len(channels)
        return (10 * ramp).expand(1, count, *image.shape[2:])


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPL", "PIR", "ILA"])
def test_a_network_reads_the_axes_of_its_orientation(codes):
    """The half that the network calls first lies on the side of the body that its axis names."""
    shape = {"R": 40, "L": 40, "A": 48, "P": 48, "S": 32, "I": 32}
    patch = tuple(shape[code] for code in codes)
    net = Directed(patch=patch, spacing_mm=(2.0, 2.0, 2.0), orientation=codes)
    hu = np.zeros((40, 48, 32), np.float32)
    affine = np.diag([2.0, 2, 2, 1])
    hu[0, 0, 0] = -1000
    mask = segment((hu, affine), net, postprocess=False).mask("liver")
    assert net.encoded[0][2:] == patch
    axis = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}[codes[0]]
    half = np.arange(hu.shape[axis]) < hu.shape[axis] / 2
    expected = half if codes[0] in "RAS" else ~half
    assert np.array_equal(mask, np.broadcast_to(
        np.expand_dims(expected, tuple({0, 1, 2} - {axis})), mask.shape))  # fmt: skip


@pytest.mark.parametrize("codes", ["LPS", "SPL", "PIR"])
def test_a_pointwise_network_sees_the_same_in_every_orientation(codes):
    """Clean-up, boxes and spacing stay with the patient's axes, whatever the network's are."""
    spacing = dict(zip("RLAPSI", (1.5, 1.5, 2.0, 2.0, 2.5, 2.5), strict=True))
    own = network(spacing_mm=(1.5, 2.0, 2.5))
    turned = network(spacing_mm=tuple(spacing[code] for code in codes), orientation=codes)
    ours, theirs = (segment(ball_ct(), net) for net in (own, turned))
    for name in ours.classes:
        one, other = ours.probabilities(name), theirs.probabilities(name)
        kept = np.maximum(one, other) > 0.06  # below 0.05 it depends on the slab what is kept
        assert np.abs(one - other)[kept].max(initial=0) <= 1.5 / QUANTA
        assert np.array_equal(ours.mask(name), theirs.mask(name))
    assert ours.present == theirs.present == ("liver", "liver_tumor", "my_structure")


def test_files_lie_on_the_grid_of_the_ct(tmp_path):
    image = nib.Nifti1Image(*ball_ct())
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 2)
    nib.save(image, tmp_path / "ct.nii.gz")
    ct = nib.load(tmp_path / "ct.nii.gz")
    for file in segment(tmp_path / "ct.nii.gz").save(tmp_path / "out", layout="both"):
        if file.name.endswith(".nii.gz"):
            saved = nib.load(file)
            assert saved.shape == ct.shape
            assert np.array_equal(saved.affine, ct.affine)
            assert (saved.header["sform_code"], saved.header["qform_code"]) == (1, 2)


def test_thick_slices_and_fine_networks_agree_on_the_volume():
    affine = np.diag([1.0, 1.0, 6.0, 1.0])
    ct = ball_ct(affine=affine, shape=(70, 70, 14))
    assert segment(ct).volumes_ml["liver"] == pytest.approx(ball_ml(22), rel=0.05)


def test_mask_is_probability_above_threshold():
    result = segment(ball_ct())
    for name in result.classes:
        probabilities = result.probabilities(name)
        assert probabilities.dtype == np.float32 and probabilities.min() >= 0
        assert probabilities.max() <= 1
        assert np.array_equal(result.mask(name), probabilities > result.threshold)


# --- windows -------------------------------------------------------------------------------------


def test_windows_of_a_pointwise_network_blend_to_the_single_pass():
    hu = np.random.default_rng(0).normal(0, 500, (45, 38, 71)).astype(np.float32)
    small, large = network(patch=(16, 24, 32)), network(patch=(48, 40, 72))
    maps = []
    for net in (small.eval(), large.eval()):
        slabs = list(slide(net, hu, [0, 1, 3], device=CPU, overlap=0.5, progress=False))
        assert [z for z, _ in slabs] == list(np.cumsum([0, *(s.shape[-1] for _, s in slabs[:-1])]))
        maps.append(np.concatenate([slab for _, slab in slabs], axis=-1).astype(int))
    assert len(small.encoded) > 10 and len(large.encoded) == 1
    assert maps[0].shape == (3, *hu.shape)
    assert np.abs(maps[0] - maps[1]).max() <= 1  # of 255


def test_slabs_join_to_the_whole():
    random = np.random.default_rng(0)
    whole = (random.random((2, 9, 8, 20)) ** 4 * QUANTA).astype(np.uint8)
    whole[1] = 0
    slabs = ((z, whole[..., z : z + 6]) for z in range(0, 20, 6))
    first, second = collect(slabs, 2)
    assert second is None
    full = first.full((9, 8, 20))
    assert np.array_equal(full, np.where(full > 0, whole[0], 0))
    assert (whole[0][full == 0] < 0.05 * QUANTA).all()


def test_importance_and_starts_are_those_of_monai():
    for size in ((96, 96, 96), (32, 48, 16)):
        ours = importance_map(size)
        monai = compute_importance_map(size, mode="gaussian", sigma_scale=0.125, device="cpu")
        assert torch.allclose(ours, monai.float(), atol=1e-6)
    for size, window, overlap in ((100, 96, 0.5), (300, 96, 0.5), (96, 96, 0.25), (150, 64, 0.7)):
        interval = int(window * (1 - overlap))
        expected = [s[0].start for s in dense_patch_slices((size,), (window,), (interval,))]
        assert sorted(set(window_starts(size, window, overlap))) == sorted(set(expected))


def test_small_volumes_get_small_windows_that_the_backbone_takes():
    assert window_size((200, 200, 200), (96, 96, 96), 32) == (96, 96, 96)
    assert window_size((50, 70, 5), (96, 96, 96), 32) == (64, 96, 64)
    # Never a single voxel at the bottleneck, whatever the patch.
    assert window_size((5, 5, 5), (32, 32, 32), 32) == (64, 64, 64)
    assert window_size((3, 3, 3), (96, 96, 96), 8) == (16, 16, 16)
    assert window_size((100, 100, 100), (90, 90, 90), 32) == (96, 96, 96)  # a patch off the grid


@pytest.mark.parametrize("shape", [(2, 2, 2), (3, 40, 3), (5, 4, 90)])
def test_volumes_smaller_than_the_patch(shape):
    hu = np.full(shape, 300, np.float32)
    hu[0, 0, 0] = -1000
    net = network(patch=(64, 64, 64))
    result = segment((hu, np.diag([2.0, 2, 2, 1])), net)
    assert result.mask("liver").sum() == hu.size - 1
    assert all(size <= 64 and size % 8 == 0 for size in net.encoded[0][2:])
    assert set(result.truncated) >= {"liver"}


@pytest.mark.parametrize("patch", [(32, 32, 32), (64, 64, 64)])
@pytest.mark.parametrize("shape", [(2, 3, 4), (30, 2, 30)])
def test_the_embedded_backbone_takes_tiny_volumes(patch, shape):
    """Five halvings: a window of 32 voxels would leave one, which cannot be normalised."""
    torch.manual_seed(0)
    config = ModelConfig(
        name="deep",
        backbone="lite_unet",
        backbone_options={"widths": (4, 4, 4, 4, 16), "full": 16},
        classes=(ClassSpec("liver", "liver"),),
        text=TextSpec(dim=4),
        preprocessing=Preprocessing(spacing_mm=(4, 4, 4), patch_size=patch),
    )
    hu = np.full(shape, 50, np.float32)
    hu[0, 0, 0] = -1000
    model = UniversalModel(config, torch.randn(1, 4))
    result = model.segment((hu, np.diag([4.0, 4, 4, 1])), progress=False)
    assert result.mask("liver").shape == shape
    assert np.isfinite(result.probabilities("liver")).all()


def test_memory_does_not_grow_with_the_length_of_the_scan(monkeypatch):
    held = []
    advance = SlabAccumulator.advance

    def spy(self, z):
        held.append(self.total.numel())
        return advance(self, z)

    monkeypatch.setattr(SlabAccumulator, "advance", spy)
    for length in (40, 160):
        held.clear()
        hu = np.zeros((32, 32, length), np.float32)
        sizes = [slab.shape for _, slab in slide(network().eval(), hu, [0, 3], device=CPU,
                                                 overlap=0.5, progress=False)]  # fmt: skip
        assert set(held) == {2 * 32 * 32 * 32}  # classes × X × Y × one window
        assert sum(shape[-1] for shape in sizes) == length


def test_maps_hold_bytes_around_the_structure_only():
    result = segment(ball_ct())
    ball = result.maps["liver"]
    assert ball.values.dtype == np.uint8
    assert max(ball.values.shape) <= 2 * 22 / 2 + 8  # voxels of 2 mm, and a margin
    assert "spleen" not in result.maps  # nothing is that bright


def test_features_are_computed_once_a_window():
    one, all_classes = network(), network()
    segment(ball_ct(), one, classes=["liver"])
    segment(ball_ct(), all_classes)
    assert len(one.encoded) == len(all_classes.encoded)


def test_every_hu_window_is_a_channel():
    net = network(windows=(WINDOW, (-160.0, 240.0)))
    segment(ball_ct(), net)
    assert {shape[1] for shape in net.encoded} == {2}


def test_only_the_box_around_the_body_is_computed():
    hu, affine = ball_ct()
    wide = np.pad(hu, 60, constant_values=-1000)
    small, large = network(), network()
    first = segment((hu, affine), small)
    second = segment((wide, affine), large)
    assert len(large.encoded) <= 2 * len(small.encoded)
    assert second.volumes_ml["liver"] == pytest.approx(first.volumes_ml["liver"], rel=0.01)


def test_only_air_gives_empty_masks():
    hu = np.full((20, 20, 20), -1000, np.float32)
    hu[0] = -900
    result = segment((hu, np.eye(4)))
    assert result.present == () and set(result.volumes_ml.values()) == {0.0}
    assert not result.label_map().any()


# --- classes, devices, options -------------------------------------------------------------------


@pytest.mark.parametrize("postprocess", [True, False])
@pytest.mark.parametrize("name", ["liver", "liver_tumor", "my_structure"])
def test_a_class_alone_is_what_it_is_among_all(name, postprocess):
    alone = segment(ball_ct(), classes=[name], postprocess=postprocess)
    among = segment(ball_ct(), postprocess=postprocess)
    assert alone.classes == (name,)
    assert np.array_equal(alone.probabilities(name), among.probabilities(name))
    assert alone.label_values[name] == among.label_values[name]


def test_aliases_and_single_names():
    result = segment(ball_ct(), classes="Hepatic tumour")
    assert result.classes == ("liver_tumor",)
    assert result.mask("liver tumor").any()
    with pytest.raises(UsageError, match="spleen"):
        segment(ball_ct()).mask("spleeen")
    with pytest.raises(UsageError, match=r"Unknown class 'livr'.*'liver'"):
        segment(ball_ct(), classes=["livr"])
    with pytest.raises(UsageError, match="No class"):
        segment(ball_ct(), classes=[])


def test_postprocessing_can_be_left_out():
    hu, affine = ball_ct()
    hu[9, 9, 5] = hu[10, 9, 5] = hu[9, 9, 6] = 900  # a speck far from the ball
    hu[9:13, 8:12, 4:8] = 400
    raw, clean = (segment((hu, affine), postprocess=flag) for flag in (False, True))
    assert raw.mask("liver")[11, 10, 6] and not clean.mask("liver")[11, 10, 6]
    assert clean.mask("liver").any()
    assert raw.mask("my_structure").any()


def test_an_organ_that_changes_sides_keeps_its_volume():
    """Both kidneys under one name: the clean-up gives each its side, and takes nothing off."""
    hu, affine = ball_ct(12, affine=np.diag([1.5, 1.5, 2.5, 1.0]), shape=(101, 50, 33))
    body = hu.clip(max=0)
    both = body + np.roll(hu - body, -24, axis=0) + np.roll(hu - body, 20, axis=0)
    net = network()
    sides = {"liver": "kidney_right", "liver_tumor": "x", "spleen": "kidney_left"}
    classes = tuple(
        ClassSpec(sides.get(spec.name, spec.name), "", None) for spec in net.config.classes
    )
    net.config = replace(net.config, classes=classes)
    raw, clean = (segment((both, affine), net, postprocess=flag) for flag in (False, True))
    assert raw.volumes_ml["kidney_left"] == 0
    for name in ("kidney_right", "kidney_left"):
        assert clean.volumes_ml[name] == pytest.approx(raw.volumes_ml["kidney_right"] / 2, rel=0.01)
    assert not (clean.mask("kidney_right") & clean.mask("kidney_left")).any()


def test_training_mode_is_left_as_it_was():
    net = network().train()
    segment(ball_ct(), net)
    assert net.training
    segment(ball_ct(), net.eval())
    assert not net.training


def test_no_bar_is_drawn_into_a_file(capsys):
    segment(ball_ct(), progress=True)
    assert capsys.readouterr().err == ""


def test_devices():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UsageError, match=r"Unknown device 'gpux'.*cuda:1"):
        choose_device("gpux")
    with pytest.raises(UsageError, match=r"'cuda:99' is not available.*cpu"):
        choose_device("cuda:99")


def test_wrong_options_are_refused_before_anything_is_computed():
    net = network()
    with pytest.raises(UsageError, match="overlap is 1"):
        segment(ball_ct(), net, overlap=1)
    with pytest.raises(VolumeError, match="does not exist"):
        segment("nothing.nii.gz", net)
    assert not net.encoded


def test_progress_goes_to_a_terminal_and_can_be_left_out(capsys, monkeypatch):
    segment(ball_ct(), progress=True)
    assert capsys.readouterr().err == ""  # no bars in a file of messages
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    segment(ball_ct(), progress=True)
    assert "segment" in capsys.readouterr().err
    segment(ball_ct(), progress=False)
    captured = capsys.readouterr()
    assert not captured.err and not captured.out


# --- the result ----------------------------------------------------------------------------------


def test_label_map_shows_lesions_over_organs_and_small_over_large():
    result = segment(ball_ct())
    label_map = result.label_map()
    values = result.label_values
    assert label_map.dtype == np.uint8 and label_map.shape == result.volume.shape
    assert np.array_equal(label_map == values["liver_tumor"], result.mask("liver_tumor"))
    liver_only = result.mask("liver") & ~result.mask("liver_tumor")
    assert np.array_equal(label_map == values["liver"], liver_only)
    assert (label_map[result.mask("my_structure") & ~result.mask("liver")] == 4).all()


def test_what_reaches_the_border_is_truncated():
    result = segment(ball_ct())
    assert result.truncated == ("my_structure",)  # the body fills every slice
    assert result.present == ("liver", "liver_tumor", "my_structure")


@pytest.mark.parametrize("layout", ["multilabel", "per_class", "both"])
@pytest.mark.parametrize("target", ["out.v1.2", "seg.nii.gz"])
def test_every_class_can_be_read_back(tmp_path, layout, target):
    result = segment(ball_ct())
    files = result.save(tmp_path / target, layout=layout)
    assert all(file.is_file() for file in files)
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(files)
    sidecar = next(file for file in files if file.suffix == ".json")
    content = json.loads(sidecar.read_text())
    assert (content["label_map"] is None) == (layout == "per_class")
    for value, label in content["labels"].items():
        if label["file"]:
            mask = np.asarray(nib.load(sidecar.parent / label["file"]).dataobj) > 0
        else:
            stored = nib.load(sidecar.parent / content["label_map"])
            mask = np.asarray(stored.dataobj) == int(value)
            shown = mask.sum()
            if label["hidden_voxels"]:  # by the description of the format alone
                arrays = np.load(sidecar.parent / content["hidden"])
                x, y, z = arrays[f"{value}_start"]
                a, b, c = arrays[f"{value}_shape"]
                bits = np.unpackbits(arrays[f"{value}_bits"], axis=-1, count=c)
                mask[x : x + a, y : y + b, z : z + c] |= bits == 1
            assert mask.sum() - shown == label["hidden_voxels"]
        assert np.array_equal(mask, result.mask(label["name"])), label["name"]
        assert label["volume_ml"] == pytest.approx(result.volumes_ml[label["name"]], abs=1e-3)
    tumour = content["labels"]["2"]
    assert tumour["name"] == "liver_tumor" and tumour["parent"] == "liver"
    assert tumour["display"] == "Liver tumor" and len(tumour["colour"]) == 3


def test_what_classes_hide_of_others_is_in_one_small_file(tmp_path):
    files = segment(ball_ct()).save(tmp_path / "seg.nii.gz")
    assert {f.name for f in files} == {
        *("seg.nii.gz", "seg.segmentation.json", "seg.volumes.csv", "seg.hidden.npz")
    }
    both = segment(ball_ct()).save(tmp_path / "out", layout="both")
    assert "hidden.npz" not in {f.name for f in both}, "each class has its own file"


def test_saving_refuses_what_it_cannot_write(tmp_path):
    result = segment(ball_ct())
    with pytest.raises(UsageError, match="multilabel, per_class, both"):
        result.save(tmp_path, layout="all")
    for name in ("seg.nrrd", "seg.png"):
        with pytest.raises(UsageError, match=r"\.nii\.gz"):
            result.save(tmp_path / name)


def test_a_class_cannot_write_outside_the_folder(tmp_path):
    net = network()
    names = ("../../liver", "a/b", "a_b", "C:\\x")
    classes = tuple(ClassSpec(name, "") for name in names)
    net.config = replace(net.config, classes=classes)
    result = segment(ball_ct(), net, postprocess=False)
    files = result.save(tmp_path / "deep" / "out", layout="per_class")
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(files)
    assert {p.parent.name for p in files} == {"segmentations", "out"}
    labels = json.loads(files[-1].read_text())["labels"].values()
    assert [label["name"] for label in labels] == list(names)
    assert len({label["file"] for label in labels}) == len(names)


@pytest.mark.parametrize("name", ["SEG.NII.GZ", "seg.nii"])
def test_suffixes_in_any_case(tmp_path, name):
    result = segment(ball_ct())
    saved = nib.load(result.save(tmp_path / name)[0])
    assert np.array_equal(np.asarray(saved.dataobj), result.label_map())
    (tmp_path / "scan.dcm").mkdir()  # a folder, whatever its name
    assert result.save(tmp_path / "scan.dcm")[0].parent == tmp_path / "scan.dcm"


# --- the real model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> UniversalModel:
    torch.manual_seed(0)
    config = ModelConfig(
        name="tiny",
        backbone="lite_unet",
        backbone_options={"widths": (8, 8, 16), "full": 16},
        classes=tuple(ClassSpec(c.name, c.name, c.parent) for c in CLASSES),
        text=TextSpec(dim=8),
        preprocessing=Preprocessing(spacing_mm=(4, 4, 4), patch_size=(32, 32, 32)),
    )
    return UniversalModel(config, torch.randn(32, 8))


def test_model_segments_like_its_forward_pass(model):
    hu = np.random.default_rng(1).uniform(-170, 250, (24, 32, 16)).astype(np.float32)
    result = read_ct_and_segment(model, hu)
    image = ((torch.from_numpy(hu) + 175) / 425)[None, None]
    with torch.no_grad():
        logits = model.eval()(image)[0]
    for name in result.classes:
        expected = logits[model.classes.index(name)].sigmoid().numpy()
        found = result.probabilities(name)
        matters = expected > 0.06
        assert np.abs(found - expected)[matters].max(initial=0) < 0.01


def read_ct_and_segment(model: UniversalModel, hu: np.ndarray):
    with pytest.warns(UserWarning, match="without any air"):
        ct = read_ct((hu, np.diag([4.0, 4, 4, 1])))
    return model.segment(ct, postprocess=False, progress=False)


def test_subset_of_the_real_model(model):
    hu = np.random.default_rng(2).normal(0, 400, (40, 36, 50)).astype(np.float32)
    ct = read_ct((hu, np.diag([4.0, 4, 4, 1])))
    everything = model.segment(ct, progress=False)
    for name in ("liver", "kidney_tumor", "lung_left"):
        alone = model.segment(ct, classes=[name], progress=False)
        difference = alone.probabilities(name) - everything.probabilities(name)
        assert np.abs(difference).max() <= 1.5 / QUANTA


@pytest.mark.slow
def test_a_real_ct_segments(model, open_data, tmp_path):
    result = model.segment(open_data / "totalsegmentator_example" / "ct.nii.gz", progress=False)
    assert set(result.volumes_ml) == set(model.classes)
    assert result.save(tmp_path)[0].is_file()


# --- trust ----------------------------------------------------------------------------------------


def calibrated(sha256: str) -> ThresholdNetwork:
    """A network that has weights of a name, and a calibration of weights called "a"."""
    net = ThresholdNetwork()
    net.weights_sha256 = sha256
    net.calibration = Calibration("a", 1.0, {"liver": 0.0}, (0.5,), (-1, -0.2), (1, 0.1), 9, "")
    return net


def test_how_far_each_mask_can_be_trusted_is_part_of_the_result(tmp_path):
    result = segment(ball_ct(), calibrated("a"))
    liver, spleen = result.trust["liver"], result.trust["spleen"]
    assert (liver.state, liver.size) == ("found", "small")  # a ball of 45 ml
    assert liver.attenuation == "high" and 300 < liver.mean_hu < 450
    assert liver.dice == pytest.approx(liver.own_dice) and spleen.state == "not found"
    assert liver.dice_low == pytest.approx(liver.dice - 0.2)
    files = result.save(tmp_path / "out")
    assert Sidecar.read(files[-1]).quality == result.trust
    with (tmp_path / "out" / "volumes.csv").open(newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert rows["liver"]["state"] == "found" and rows["spleen"]["mean_hu"] == ""
    assert rows["liver"]["dice_expected"] == f"{liver.dice:.2f}"
    assert rows["liver"]["doubts"].startswith("unusually small; unusually high attenuation")


def test_a_calibration_speaks_for_its_own_weights_only():
    trust = segment(ball_ct(), calibrated("b")).trust["liver"]
    assert trust.own_dice is not None and trust.dice is None


def test_a_body_that_lies_mirrored_is_a_doubt_about_the_whole_scan(tmp_path, monkeypatch):
    monkeypatch.setattr(
        predict, "assess", lambda *_: (dict.fromkeys(ABOVE_HU, Trust("found")), ["Odd."])
    )
    with pytest.warns(VolumeWarning, match="Odd"):
        result = segment_volume(network(), ball_ct(), progress=False)
    assert result.warnings == ("Odd.",)
    assert Sidecar.read(result.save(tmp_path / "out")[-1]).warnings == ("Odd.",)
