"""A linear head on a backbone: what it says, what it learns from, and that a kill costs nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foundation.tuning.tuner import Tuner
from tiny import tiny_model
from torch.nn import functional
from tuning_trees import SPACING_MM, write_folders

from foundation import from_pretrained
from foundation.config import Preprocessing
from foundation.data.naming import NewClass
from foundation.errors import UsageError, WeightsError
from foundation.evaluation.scores import evaluate
from foundation.hub.saved import save_pretrained
from foundation.inference.predict import segment_volume
from foundation.model import UniversalModel
from foundation.networks.branches import read_out
from foundation.networks.plain_head import LinearNetwork, drop_head, load_linear, save_linear
from foundation.text import MINILM
from foundation.tuning.data import TuningData, read_data
from foundation.tuning.objective import Forward
from foundation.tuning.start import (
    keep_head,
    published_preprocessing,
    transfer_preprocessing,
    untrained,
    untrained_by_name,
    untrained_like,
)
from foundation.tuning.transfer import build_transfer, linear_losses, transfer_method

CLASSES = ("vertebrae_L1", "hip_left", "hip_right")
# Not 16³: where a convolution sees 2 voxels along its first axis, torch 2.14 computes its gradient,
# in bfloat16 on a CPU, from memory that nobody has written to.
GRID = Preprocessing(spacing_mm=(SPACING_MM,) * 3, patch_size=(24, 16, 16))
IMAGE = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))


def network(activation: Any = "softmax", seed: int = 0) -> LinearNetwork:
    linear = drop_head(tiny_model(), CLASSES, activation, preprocessing=GRID, seed=seed)
    with torch.no_grad():
        linear.head.convolution.weight.mul_(5)  # so that every channel wins somewhere
    return linear


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TuningData:
    root = tmp_path_factory.mktemp("scans")
    return read_data(
        write_folders(root / "scans", cases=3),
        classes=[NewClass(name, labels=(name,)) for name in CLASSES],
        work=root / "work",
        spacing_mm=SPACING_MM,
        workers=1,
        progress=False,
    )


# --- what it says ---------------------------------------------------------------------------------


@torch.no_grad()
def test_softmax_has_background_and_sums_to_one() -> None:
    shares = network().probabilities(IMAGE)
    assert shares.shape == (2, 4, 16, 16, 16)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 16, 16, 16))
    independent = network("sigmoid").probabilities(IMAGE)
    assert independent.shape == (2, 3, 16, 16, 16)
    assert (independent.sum(1) - 1).abs().max() > 0.1


@torch.no_grad()
def test_masks_of_a_softmax_are_those_of_argmax() -> None:
    linear = network()
    winner = linear.probabilities(IMAGE).argmax(1)
    assert winner.unique().tolist() == [0, 1, 2, 3]
    masks = linear(IMAGE) > 0
    for channel in range(3):
        assert torch.equal(masks[:, channel], winner == channel + 1)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_class_says_the_same_whichever_others_are_asked(activation: str) -> None:
    linear = network(activation)
    pyramid = linear.backbone.encode(IMAGE)
    full = linear.backbone.decode(pyramid)
    chosen = read_out(linear, full, pyramid, [2, 0])
    torch.testing.assert_close(chosen, linear(IMAGE)[:, [2, 0]])


@torch.no_grad()
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logits_at_voxels_are_those_of_the_probabilities(activation: str) -> None:
    linear = network(activation)
    voxels = torch.tensor([[0, 5, 4095], [7, 7, 100]])
    logits, features = linear.logits_at(IMAGE, voxels)
    assert features.shape == (2, 16, 3)
    if activation == "softmax":
        said = torch.cat([torch.zeros(2, 1, 3), logits], 1).softmax(1)
    else:
        said = logits.sigmoid()
    every = linear.probabilities(IMAGE).flatten(2)
    torch.testing.assert_close(said, every.gather(2, voxels[:, None].expand(-1, said.shape[1], -1)))
    whole, _ = linear.logits_at(IMAGE, torch.arange(4096).expand(2, -1))
    torch.testing.assert_close(whole[0, :, voxels[0]], logits[0])


@pytest.mark.filterwarnings("ignore:The given tuple")  # all of it is body
def test_a_scan_is_segmented_by_the_likeliest_channel() -> None:
    linear = network()
    hu = np.random.default_rng(0).uniform(-170, 250, (16, 16, 16)).astype(np.float32)
    hu[0] = -170  # all of it is body, and one window
    found = segment_volume(linear, (hu, np.diag([SPACING_MM] * 3 + [1.0])), progress=False)
    image = ((torch.from_numpy(hu) + 175) / 425).clamp(0, 1)[None, None]
    with torch.no_grad():
        winner = linear.probabilities(image)[0].argmax(0).numpy()
    for channel, name in enumerate(CLASSES, start=1):
        assert np.mean(found.mask(name) == (winner == channel)) > 0.995  # steps of 1/255
    assert sum(found.mask(name).astype(int) for name in CLASSES).max() == 1


# --- what it is made of ---------------------------------------------------------------------------


def test_the_backbone_is_kept_and_the_head_is_new() -> None:
    model = tiny_model()
    linear = drop_head(model, CLASSES, seed=3)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(linear.backbone.state_dict()[name], value)
    assert {name for name in linear.state_dict() if not name.startswith("backbone.")} == {
        "head.convolution.weight",
        "head.convolution.bias",
    }
    assert linear.head.convolution.weight.shape == (4, 16, 1, 1, 1)
    same, other = (drop_head(model, CLASSES, seed=seed) for seed in (3, 4))
    assert torch.equal(linear.head.convolution.weight, same.head.convolution.weight)
    assert not torch.equal(linear.head.convolution.weight, other.head.convolution.weight)
    with torch.no_grad():
        next(linear.backbone.parameters()).zero_()
    assert next(model.backbone.parameters()).abs().sum() > 0, "a copy"


def test_what_cannot_be_made() -> None:
    two = replace(GRID, hu_windows=((-175.0, 250.0), (-1000.0, 1000.0)))
    with pytest.raises(UsageError, match="tiny reads 1 HU windows, not 2"):
        drop_head(tiny_model(), CLASSES, preprocessing=two)
    with pytest.raises(UsageError, match="choose softmax or sigmoid"):
        drop_head(tiny_model(), CLASSES, "relu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least one"):
        drop_head(tiny_model(), [])


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    linear = network("sigmoid")
    loaded = load_linear(save_linear(linear, tmp_path / "model"))
    assert loaded.config == linear.config and loaded.activation == "sigmoid"
    assert torch.equal(loaded(IMAGE), linear(IMAGE))
    assert not loaded.training
    with pytest.raises(WeightsError, match="lacks prompt_embedding"):
        from_pretrained(tmp_path / "model")


def test_loading_is_strict(tmp_path: Path) -> None:
    folder = save_linear(network(), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(WeightsError, match="damaged or was changed"):
        load_linear(folder)
    with pytest.raises(WeightsError, match="loaded by from_pretrained"):
        load_linear(save_pretrained(tiny_model(), tmp_path / "text"))
    with pytest.raises(WeightsError, match="not a complete saved model"):
        load_linear(tmp_path / "nowhere")


# --- where it starts from -------------------------------------------------------------------------


def prompted() -> UniversalModel:
    config = replace(tiny_model().config, text=MINILM, standardise_text=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = UniversalModel(config, torch.randn(3, MINILM.dim)).eval()
        model.head.text_shift.normal_()
    return model


def test_untrained_is_the_same_but_for_what_was_learnt() -> None:
    model = prompted()
    drawn = untrained_like(model, seed=5)
    assert drawn.config == replace(model.config, name="untrained tiny")
    assert torch.equal(drawn.head.text_shift, model.head.text_shift)
    key = "down.0.0.0.weight"
    one, other = (each.backbone.state_dict()[key] for each in (model, drawn))
    assert not torch.equal(one, other)
    assert torch.equal(other, untrained_like(model, seed=5).backbone.state_dict()[key])


@torch.no_grad()
def test_a_kept_head_reads_known_classes_as_before() -> None:
    model = untrained("lite_unet", ("liver", "spleen"), published_preprocessing(), seed=0)
    told = keep_head(model, ("spleen", "rib_left_3"), GRID)
    assert told.classes == ("spleen", "rib_left_3") and told.config.preprocessing == GRID
    image = torch.rand(1, 1, 32, 32, 64)
    torch.testing.assert_close(told(image)[:, 0], model(image)[:, 1])


def test_how_scans_are_read_depends_on_the_weights() -> None:
    published = published_preprocessing()
    assert published.hu_windows == ((-250.0, 250.0),)
    one = tiny_model()
    assert transfer_preprocessing(one) == published, "one window at 1.5 mm"
    changed = transfer_preprocessing(one, hu_window=(-100.0, None), patch_size=32)
    assert changed.hu_windows == ((-100.0, 250.0),) and changed.patch_size == (32,) * 3
    embedded = from_pretrained("universal-ct")
    assert transfer_preprocessing(embedded) == embedded.config.preprocessing
    with pytest.raises(UsageError, match="learnt from them"):
        transfer_preprocessing(embedded, hu_window=(-250.0, 250.0))
    with pytest.raises(UsageError, match=r"Unknown backbone 'resnet'. Choose from lite_unet"):
        untrained_by_name("resnet", CLASSES, 0)


# --- what it learns from --------------------------------------------------------------------------


def given(activation: str, known: tuple[bool, ...] = (True, True, True)) -> Forward:
    """Two scans of 50 voxels; the second labels what `known` says."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(4, (2, 50), generator=generator)
    target = torch.stack([values == channel for channel in (1, 2, 3)], 1)
    annotated = torch.tensor([[True, True, True], known])
    logits = torch.randn(2, 3, 50, generator=generator, requires_grad=True)
    return Forward(logits, target & annotated[..., None], annotated, torch.ones(2, 50))


def test_softmax_loss_is_cross_entropy_with_background_and_dice_of_the_classes() -> None:
    forward = given("softmax")
    terms = linear_losses(forward, 0.0, activation="softmax")
    assert set(terms) == {"dice", "exclusive"}
    scores = torch.cat([torch.zeros(2, 1, 50), forward.logits], 1)
    truth = torch.where(forward.target.any(1), forward.target.int().argmax(1) + 1, 0)
    torch.testing.assert_close(terms["exclusive"], functional.cross_entropy(scores, truth))
    shares = scores.softmax(1)[:, 1:]
    both = (shares * forward.target).sum(2)
    dice = 1 - (2 * both + 1) / (shares.sum(2) + forward.target.sum(2) + 1)
    torch.testing.assert_close(terms["dice"], dice.mean())


def test_sigmoid_loss_is_binary_cross_entropy_and_dice() -> None:
    forward = given("sigmoid")
    terms = linear_losses(forward, 0.0, activation="sigmoid")
    assert set(terms) == {"dice", "binary"}
    expected = functional.binary_cross_entropy_with_logits(forward.logits, forward.target.float())
    torch.testing.assert_close(terms["binary"], expected)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_class_that_a_scan_does_not_label_gets_no_gradient(activation: Any) -> None:
    forward = given(activation, known=(True, False, True))
    sum(linear_losses(forward, 0.0, activation=activation).values()).backward()  # type: ignore[union-attr]
    gradient = forward.logits.grad
    assert gradient is not None and gradient[1, 1].abs().sum() == 0
    assert (gradient[1, [0, 2]].abs().sum(1) > 0).all() and (gradient[0].abs().sum(1) > 0).all()


def method(head: str, steps: int = 6, **changes: Any) -> Any:
    plan = transfer_method(head, GRID, steps, learning_rate=1e-2)
    return replace(plan, **{"validate_every": 3, "save_every": 2, **changes})


def train(start: Any, data: TuningData, head: str, folder: Path, **changes: Any) -> Tuner:
    tuner = build_transfer(
        *(start, data, method(head, **changes), folder),
        seed=1,
        device=torch.device("cpu"),
        progress=False,
    )
    tuner.train()
    return tuner


@pytest.mark.parametrize("head", ["softmax", "sigmoid", "text"])
def test_a_killed_training_ends_as_the_unbroken_one(
    head: str, data: TuningData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh() -> Any:
        return keep_head(prompted(), CLASSES, GRID) if head == "text" else network(head)

    unbroken, resumed, untouched = fresh(), fresh(), fresh()
    kind = type(build_transfer(
        *(fresh(), data, method(head), tmp_path / "kind"), seed=1, device=torch.device("cpu")
    ))  # fmt: skip
    train(unbroken, data, head, tmp_path / "unbroken")
    step = kind._train_step

    def broken(self: Tuner) -> None:
        if self.step == 5:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "_train_step", broken)
        with pytest.raises(KeyboardInterrupt):
            train(fresh(), data, head, tmp_path / "broken")
    tuner = train(resumed, data, head, tmp_path / "broken")
    one, other, first = (each.state_dict() for each in (unbroken, resumed, untouched))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    if tuner.best_step:
        assert any(not torch.equal(one[name], first[name]) for name in one)
    logs = [(tmp_path / run / "validation.csv").read_bytes() for run in ("unbroken", "broken")]
    assert logs[0] == logs[1]
    with pytest.raises(UsageError, match="other settings"):
        train(fresh(), data, head, tmp_path / "broken", learning_rate=1e-3)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_it_learns_what_the_scans_show(head: Any, data: TuningData, tmp_path: Path) -> None:
    linear = network(head)
    before = evaluate(linear, data.validation, CLASSES, postprocess=False, progress=False)
    tuner = train(linear, data, head, tmp_path, steps=80, validate_every=40)
    after = evaluate(linear, data.validation, CLASSES, postprocess=False, progress=False)
    assert tuner.best_step > 0
    assert (after.mean(CLASSES) or 0) > (before.mean(CLASSES) or 0) + 0.2


def test_the_plan_has_the_published_proportions() -> None:
    plan = transfer_method("softmax", published_preprocessing(), 200 * 1081)
    assert (plan.warm_up, plan.validate_every) == (20 * 1081, 10 * 1081)
    assert (plan.learning_rate, plan.weight_decay, plan.voxels) == (1e-4, 1e-5, 96**3)
    assert plan.patience * plan.validate_every > plan.steps, "it never stops early"
    with pytest.raises(UsageError, match="voxels is 0"):
        transfer_method("softmax", GRID, 10, voxels=0)


def test_a_patch_that_does_not_fit_is_refused(data: TuningData, tmp_path: Path) -> None:
    odd = drop_head(tiny_model(), CLASSES, preprocessing=replace(GRID, patch_size=(12, 16, 16)))
    with pytest.raises(UsageError, match=r"\(12, 16, 16\) voxels; lite_unet needs multiples of 8"):
        train(odd, data, "softmax", tmp_path)
    small = drop_head(tiny_model(), CLASSES, preprocessing=replace(GRID, patch_size=(8, 8, 8)))
    with pytest.raises(UsageError, match="one side of them 16 or more"):
        train(small, data, "softmax", tmp_path)


def test_the_saved_configuration_is_readable(tmp_path: Path) -> None:
    folder = save_linear(network(), tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    assert content["activation"] == "softmax"
    assert [each["name"] for each in content["network"]["classes"]] == list(CLASSES)
