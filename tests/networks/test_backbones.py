"""What every backbone keeps: one set of facts, checked for each name in `BACKBONES`."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from foundation.config import ClassSpec, ModelConfig, Preprocessing, TextSpec
from foundation.errors import UsageError, WeightsError
from foundation.hub.load import from_pretrained
from foundation.hub.saved import save_pretrained
from foundation.model import UniversalModel
from foundation.networks.backbones import BACKBONES, Backbone, build_backbone, register_backbone
from foundation.networks.backbones.dints import default_dints_paths
from foundation.networks.backbones.swin_unetr import LegacyPatchMerging

# The smallest that leaves more than one voxel at the bottleneck; no two backbones need larger.
SMALL = {"unet": (24, 16, 16), "segresnet": (24, 16, 16), "lite_unet": (64, 32, 32)}
SMALL |= {"swin_unetr": (64, 32, 32), "unetpp": (48, 32, 32)}
SMALL |= {"dints": (48, 32, 32), "mednext": (48, 32, 32)}

# Options of a narrow network, and the channels of its finest level. No width is a multiple of the
# groups of a normalisation.
NARROW = {name: ({"width": 6}, 6) for name in ("unet", "unetpp", "dints", "mednext")}
NARROW |= {"segresnet": ({"init_filters": 10}, 10), "swin_unetr": ({"feature_size": 12}, 12)}
NARROW |= {"lite_unet": ({"widths": [6, 12, 24], "full": 6}, 6)}

PUBLISHED_PARAMETERS = {"unet": 19_073_600, "swin_unetr": 62_186_610, "unetpp": 6_979_712}
SUPREM_SEGRESNET_MILLIONS = 4.70

CLASSES = tuple(ClassSpec(name, f"a {name}") for name in ("liver", "spleen", "aorta"))


def config(backbone, **options):
    return ModelConfig(
        name="test",
        backbone=backbone,
        classes=CLASSES,
        backbone_options=options,
        text=TextSpec(dim=16),
        # Two windows, so two input channels: nothing may assume one.
        preprocessing=Preprocessing(hu_windows=((-175.0, 250.0), (-1000.0, 1000.0))),
    )


# The two costly ones are slow where a check computes whole patches several times.
QUICK = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("swin_unetr", "unetpp") else name
    for name in BACKBONES
]


@pytest.fixture(scope="module", params=BACKBONES)
def model(request):
    torch.manual_seed(0)
    return UniversalModel(config(request.param), torch.randn(len(CLASSES), 16)).eval()


def image_for(model, batch=1):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 2, *SMALL[model.config.backbone], generator=generator)


@pytest.fixture(scope="module")
def pyramid(model):
    with torch.no_grad():
        return model.backbone.encode(image_for(model))


def test_every_backbone_has_a_small_size_here():
    assert SMALL.keys() == BACKBONES.keys()


def test_pyramid_has_the_declared_channels_and_strides(model, pyramid):
    size = SMALL[model.config.backbone]
    expected = [
        (1, channels, *(side // stride for side in size))
        for channels, stride in zip(model.backbone.channels, model.backbone.strides, strict=True)
    ]
    assert [tuple(level.shape) for level in pyramid] == expected
    assert list(model.backbone.strides) == sorted(set(model.backbone.strides))
    assert model.backbone.divisor % model.backbone.strides[-1] == 0


def test_the_decoded_feature_has_full_resolution(model, pyramid):
    with torch.no_grad():
        full = model.backbone.decode(pyramid)
    assert tuple(full.shape) == (1, model.backbone.full_channels, *SMALL[model.config.backbone])
    assert full.isfinite().all()


def test_decoding_leaves_the_pyramid_as_it_was(model, pyramid):
    before = [level.clone() for level in pyramid]
    with torch.no_grad():
        model.backbone.decode(pyramid)
    assert all(torch.equal(a, b) for a, b in zip(before, pyramid, strict=True))


def test_encoder_gives_the_models_own_features(model, pyramid):
    encoder = model.encoder
    assert (encoder.channels, encoder.strides) == (model.backbone.channels, model.backbone.strides)
    with torch.no_grad():
        features = encoder(image_for(model))
    assert all(torch.equal(a, b) for a, b in zip(features, pyramid, strict=True))


def test_encoder_and_decoder_share_no_layer_and_leave_none_out(model):
    owners = {
        name: module
        for name, module in model.backbone.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    used = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: used.add(name))
        for name, module in owners.items()
    ]
    try:
        with torch.no_grad():
            features = model.backbone.encode(image_for(model))
            encoder = set(used)
            used.clear()
            model.backbone.decode(features)
    finally:
        for hook in hooks:
            hook.remove()
    assert not encoder & used
    assert encoder | used == owners.keys()
    shared = set(map(id, model.encoder.parameters()))
    assert shared == {id(p) for name in encoder for p in owners[name].parameters(recurse=False)}


@pytest.mark.parametrize("model", QUICK, indirect=True, scope="module")
def test_gradient_reaches_every_parameter(model):
    model.zero_grad()
    model(image_for(model)).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    # A bias before a normalisation has no effect, so only matrices must have some gradient.
    silent += [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.ndim > 1 and not p.grad.any()
    ]
    assert not silent
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("model", QUICK, indirect=True, scope="module")
def test_a_patch_does_not_depend_on_its_neighbours_in_the_batch(model):
    images = image_for(model, batch=2)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    # Statistics of the whole batch would move the logits by about their spread.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3 * together.std().item())


def test_a_wrong_size_names_the_divisor(model):
    divisor = model.backbone.divisor
    size = (divisor, divisor, divisor + 1)
    with pytest.raises(UsageError, match=f"multiples of {divisor}"):
        model(torch.zeros(1, 2, *size))


def test_a_configuration_survives_json(model):
    assert ModelConfig.from_json(model.config.to_json()) == dataclasses.replace(model.config)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_backbone_can_be_narrow(backbone):
    options, width = NARROW[backbone]
    narrow = UniversalModel(config(backbone, **options), torch.randn(len(CLASSES), 16)).eval()
    assert narrow.backbone.full_channels == width
    with torch.no_grad():
        pyramid = narrow.backbone.encode(image_for(narrow))
        assert [level.shape[1] for level in pyramid] == list(narrow.backbone.channels)
        assert narrow(image_for(narrow)).shape == (1, len(CLASSES), *SMALL[backbone])
    wide = build_backbone(backbone, 2)
    count, more = (sum(p.numel() for p in net.parameters()) for net in (narrow.backbone, wide))
    assert count < more / 2


@pytest.mark.parametrize("variant", "SBML")
def test_mednext_variants_are_monais(variant):
    from monai.networks.nets.mednext import create_mednext

    theirs = create_mednext(variant, in_channels=2, kernel_size=5).state_dict()
    ours = build_backbone("mednext", 2, variant=variant, kernel_size=5).net.state_dict()
    output = {"out_0.conv_out.weight", "out_0.conv_out.bias"}
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in theirs.items() if k not in output
    }


@pytest.mark.parametrize("backbone", PUBLISHED_PARAMETERS)
def test_parameters_are_as_many_as_published(backbone):
    count = sum(p.numel() for p in build_backbone(backbone, 1).parameters())
    assert count == PUBLISHED_PARAMETERS[backbone]


def test_segresnet_is_as_large_as_suprems():
    count = sum(p.numel() for p in build_backbone("segresnet", 1).parameters())
    assert round(count / 1e6, 2) == SUPREM_SEGRESNET_MILLIONS


def test_legacy_merging_reads_the_published_octants():
    merging = LegacyPatchMerging(1)
    merging.norm, merging.reduction = torch.nn.Identity(), torch.nn.Identity()
    # Each voxel of a 2×2×2 cell holds its place written in base ten: x, y, z.
    digits = [[[[100 * x + 10 * y + z] for z in (0, 1)] for y in (0, 1)] for x in (0, 1)]
    cell = torch.tensor(digits, dtype=torch.float32)[None]
    read = [f"{int(value):03d}" for value in merging(cell).flatten()]
    assert read == ["000", "100", "010", "001", "101", "010", "001", "111"]
    with pytest.raises(UsageError, match="even"):
        merging(torch.zeros(1, 3, 2, 2, 1))


def test_merging_of_choice_changes_only_the_order():
    torch.manual_seed(0)
    legacy = build_backbone("swin_unetr", 1, feature_size=12).eval()
    corrected = build_backbone("swin_unetr", 1, feature_size=12, legacy_merging=False).eval()
    corrected.load_state_dict(legacy.state_dict(), strict=True)
    image = torch.rand(1, 1, 64, 32, 32)
    with torch.no_grad():
        a, b = legacy.encode(image), corrected.encode(image)
    assert torch.equal(a[1], b[1])  # before the first merging
    assert not torch.allclose(a[2], b[2], atol=1e-2)


def test_dints_takes_another_architecture():
    paths = default_dints_paths()
    paths[3][6] = 4  # another operation on one path
    paths[0][5] = -1  # and one path fewer
    plain, other = build_backbone("dints", 1), build_backbone("dints", 1, paths=paths)
    assert plain.state_dict().keys() != other.state_dict().keys()
    closed = [[-1] * 10 for _ in range(12)]
    for wrong in (paths[:3], [[7] * 10] * 12, closed):
        with pytest.raises(UsageError, match="DiNTS paths must"):
            build_backbone("dints", 1, paths=wrong)


@pytest.fixture
def registry():
    """Backbones that a test registers are forgotten after it."""
    before = dict(BACKBONES)
    yield BACKBONES
    BACKBONES.clear()
    BACKBONES.update(before)


def test_a_new_backbone_is_one_class(registry, tmp_path):
    """What a newcomer writes; everything else works with it as it is."""

    @register_backbone("shallow")
    class Shallow(Backbone):
        encoder_parts = ("fine", "coarse")
        channels, strides, full_channels, divisor = (16, 32), (1, 2), 16, 2

        def __init__(self, in_channels=1):
            super().__init__()
            self.fine = torch.nn.Conv3d(in_channels, 16, 3, padding=1)
            self.coarse = torch.nn.Conv3d(16, 32, 2, stride=2)
            self.up = torch.nn.ConvTranspose3d(32, 16, 2, stride=2)

        def encode(self, image):
            fine = self.fine(image)
            return [fine, self.coarse(fine)]

        def decode(self, pyramid):
            return pyramid[0] + self.up(pyramid[1])

    assert registry["shallow"] is Shallow
    new = UniversalModel(config("shallow"), torch.randn(len(CLASSES), 16)).eval()
    new = from_pretrained(save_pretrained(new, tmp_path / "new"))
    assert [level.shape[1] for level in new.encoder(torch.rand(1, 2, 8, 8, 8))] == [16, 32]
    hu = torch.linspace(-1000, 300, 10 * 12 * 14).reshape(10, 12, 14).numpy()
    result = new.segment((hu, torch.eye(4).numpy()), progress=False)
    assert set(result.volumes_ml) == {"liver", "spleen", "aorta"}
    with pytest.raises(UsageError, match=r"There is a backbone 'shallow' already: .*Shallow"):
        register_backbone("shallow")(Shallow)
    Shallow.encoder_parts = ()
    with pytest.raises(UsageError, match=r"Shallow has no encoder_parts\. Name the submodules"):
        register_backbone("shallower")(Shallow)
    assert "shallower" not in registry


def test_a_saved_model_with_a_backbone_that_is_not_there_says_what_to_do(registry, tmp_path, model):
    folder = save_pretrained(model, tmp_path / "saved")
    del registry[model.config.backbone]
    with pytest.raises(WeightsError, match="must be registered before"):
        from_pretrained(folder)


def test_building_a_backbone_is_silent(capsys):
    build_backbone("dints", 1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet",
            {},
            r"'resnet'\. Did you mean 'segresnet'\? Choose from: dints, lite_unet",
        ),
        ("unet", {"depth": 5}, "'unet' cannot be built"),
        ("mednext", {"variant": "XL"}, "Unknown MedNeXt variant 'XL'. Choose from: S, B, M, L"),
    ],
)
def test_wrong_choices_say_what_is_allowed(name, options, message):
    with pytest.raises(UsageError, match=message):
        build_backbone(name, 1, **options)


@pytest.mark.slow
def test_the_embedded_models_backbone_does_without_monai():
    code = (
        "import sys; from foundation.networks.backbones import build_backbone; "
        "build_backbone('lite_unet', 1); sys.exit('monai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
