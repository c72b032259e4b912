"""Transfer: where it starts from, what it learns from, and that a kill costs nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch.nn import functional
from tuning_trees import SPACING_MM, write_folders

from foundation import finetune, from_pretrained
from foundation.config import Preprocessing
from foundation.data.naming import NewClass
from foundation.errors import UsageError
from foundation.evaluation.scoring import evaluate
from foundation.model import Model, UniversalModel
from foundation.networks.protocol import check_trainable
from foundation.text import MINILM
from foundation.training.trainer import Trainer
from foundation.tuning import Head, TuningRun
from foundation.tuning.data import TuningData, read_data
from foundation.tuning.objective import Forward
from foundation.tuning.start import (
    published_preprocessing,
    random_model,
    transfer_model,
    transfer_preprocessing,
)
from foundation.tuning.transfer import (
    build_transfer,
    plain_losses,
    transfer_method,
)

CLASSES = ("vertebrae_L1", "hip_left", "hip_right")
# Not 16³: where a convolution sees 2 voxels along its first axis, torch 2.14 computes its gradient,
# in bfloat16 on a CPU, from memory that nobody has written to.
GRID = Preprocessing(spacing_mm=(SPACING_MM,) * 3, patch_size=(24, 16, 16))


def network(head: str = "softmax", seed: int = 0) -> Model:
    if head == "text":
        return transfer_model(prompted(), CLASSES, head, preprocessing=GRID)
    model = transfer_model(tiny_model(), CLASSES, head, preprocessing=GRID, seed=seed)
    with torch.no_grad():
        model.head.convolution.weight.mul_(5)  # so that every channel wins somewhere
    return model


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


# --- where it starts from -------------------------------------------------------------------------


def test_the_backbone_is_kept_and_the_head_is_new() -> None:
    model = tiny_model()
    plain = transfer_model(model, CLASSES, seed=3)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(plain.backbone.state_dict()[name], value)
    assert {name for name in plain.state_dict() if not name.startswith("backbone.")} == {
        "head.convolution.weight",
        "head.convolution.bias",
    }
    assert plain.head.convolution.weight.shape == (4, 16, 1, 1, 1)
    same, other = (transfer_model(model, CLASSES, seed=seed) for seed in (3, 4))
    assert torch.equal(plain.head.convolution.weight, same.head.convolution.weight)
    assert not torch.equal(plain.head.convolution.weight, other.head.convolution.weight)
    with torch.no_grad():
        next(plain.backbone.parameters()).zero_()
    assert next(model.backbone.parameters()).abs().sum() > 0, "a copy"


def test_what_cannot_be_made() -> None:
    two = replace(GRID, hu_windows=((-175.0, 250.0), (-1000.0, 1000.0)))
    with pytest.raises(UsageError, match="tiny reads 1 HU windows, not 2"):
        transfer_model(tiny_model(), CLASSES, preprocessing=two)
    with pytest.raises(UsageError, match="choose softmax, sigmoid or text"):
        transfer_model(tiny_model(), CLASSES, "relu")
    with pytest.raises(UsageError, match="at least one"):
        transfer_model(tiny_model(), [])
    with pytest.raises(UsageError, match=r"head is not possible with 'tiny' \(PlainModel\)"):
        transfer_model(network(), CLASSES, "text")


def prompted() -> UniversalModel:
    config = replace(tiny_model().config, text=MINILM, standardise_text=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = UniversalModel(config, torch.randn(3, MINILM.dim)).eval()
        model.head.text_shift.normal_()
    return model


def test_random_is_the_same_but_for_what_was_learnt(tmp_path: Path) -> None:
    model = prompted()
    folder = model.save_pretrained(tmp_path / "m")
    drawn = random_model(str(folder), (), seed=5)
    assert drawn.config == replace(model.config, name="random tiny")
    assert torch.equal(drawn.head.text_shift, model.head.text_shift)
    key = "down.0.0.0.weight"
    one, other = (each.backbone.state_dict()[key] for each in (model, drawn))
    assert not torch.equal(one, other)
    assert torch.equal(other, random_model(str(folder), (), seed=5).backbone.state_dict()[key])
    assert torch.equal(other, random_model(model, (), seed=5).backbone.state_dict()[key])


@torch.no_grad()
def test_a_kept_head_reads_known_classes_as_before() -> None:
    model = random_model("lite_unet", ("liver", "spleen"), seed=0)
    grid = replace(GRID, patch_size=(32, 32, 64))
    told = transfer_model(model, ("spleen", "rib_left_3"), "text", preprocessing=grid)
    assert told.classes == ("spleen", "rib_left_3") and told.config.preprocessing == grid
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
    with pytest.raises(UsageError, match="was trained with them"):
        transfer_preprocessing(embedded, hu_window=(-250.0, 250.0))
    with pytest.raises(UsageError, match=r"Unknown backbone 'resnet'. Choose from dints"):
        random_model("resnet", CLASSES, 0)


# --- what it learns from --------------------------------------------------------------------------


def given(activation: str, known: tuple[bool, ...] = (True, True, True)) -> Forward:
    """Two scans of 50 voxels; the second labels what `known` says."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(4, (2, 50), generator=generator)
    target = torch.stack([values == channel for channel in (1, 2, 3)], 1)
    annotated = torch.tensor([[True, True, True], known])
    channels = 4 if activation == "softmax" else 3
    logits = torch.randn(2, channels, 50, generator=generator, requires_grad=True)
    return Forward(logits, target & annotated[..., None], annotated, torch.ones(2, 50))


def test_softmax_loss_is_cross_entropy_with_background_and_dice_of_the_classes() -> None:
    forward = given("softmax")
    terms = plain_losses(forward, 0.0, activation="softmax")
    assert set(terms) == {"dice", "exclusive"}
    scores = forward.logits
    truth = torch.where(forward.target.any(1), forward.target.int().argmax(1) + 1, 0)
    torch.testing.assert_close(terms["exclusive"].mean(), functional.cross_entropy(scores, truth))
    shares = scores.softmax(1)[:, 1:]
    both = (shares * forward.target).sum(2)
    dice = 1 - (2 * both + 1) / (shares.sum(2) + forward.target.sum(2) + 1)
    torch.testing.assert_close(terms["dice"].mean(), dice.mean())


def test_sigmoid_loss_is_binary_cross_entropy_and_dice() -> None:
    forward = given("sigmoid")
    terms = plain_losses(forward, 0.0, activation="sigmoid")
    assert set(terms) == {"dice", "binary"}
    expected = functional.binary_cross_entropy_with_logits(forward.logits, forward.target.float())
    torch.testing.assert_close(terms["binary"].mean(), expected)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_class_that_a_scan_does_not_label_gets_no_gradient(activation: Any) -> None:
    forward = given(activation, known=(True, False, True))
    terms = plain_losses(forward, 0.0, activation=activation)
    torch.stack([values.mean() for values in terms.values()]).sum().backward()
    gradient = forward.logits.grad
    assert gradient is not None
    gradient = gradient[:, -3:]  # of the classes
    assert gradient[1, 1].abs().sum() == 0
    assert (gradient[1, [0, 2]].abs().sum(1) > 0).all() and (gradient[0].abs().sum(1) > 0).all()


def method(head: str, steps: int = 6, **changes: Any) -> Any:
    plan = transfer_method(head, GRID, steps, learning_rate=1e-2)
    return replace(plan, **{"validate_every": 3, "save_every": 2, **changes})


def train(start: Any, data: TuningData, head: str, folder: Path, **changes: Any) -> Trainer:
    plan = method(head, **changes)
    cpu = torch.device("cpu")
    trainer = build_transfer(start, data, plan, folder, seed=1, device=cpu, progress=False)
    trainer.train()
    return trainer


@pytest.mark.parametrize("head", ["softmax", "sigmoid", "text"])
def test_a_killed_training_ends_as_the_unbroken_one(
    head: str, data: TuningData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, resumed, untouched = network(head), network(head), network(head)
    train(unbroken, data, head, tmp_path / "unbroken")
    step = Trainer.train_step

    def broken(self: Trainer, batches: Any) -> None:
        if self.step == 5:
            raise KeyboardInterrupt
        step(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", broken)
        with pytest.raises(KeyboardInterrupt):
            train(network(head), data, head, tmp_path / "broken")
    trainer = train(resumed, data, head, tmp_path / "broken")
    one, other, first = (each.state_dict() for each in (unbroken, resumed, untouched))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    if trainer.best_step:
        assert any(not torch.equal(one[name], first[name]) for name in one)
    logs = [(tmp_path / run / "validation.csv").read_bytes() for run in ("unbroken", "broken")]
    assert logs[0] == logs[1]
    with pytest.raises(UsageError, match="other settings"):
        train(network(head), data, head, tmp_path / "broken", learning_rate=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_it_learns_what_the_scans_show(head: Any, data: TuningData, tmp_path: Path) -> None:
    plain = network(head)
    before = evaluate(plain, data.validation, CLASSES, postprocess=False, progress=False)
    trainer = train(plain, data, head, tmp_path, steps=80, validate_every=40)
    after = evaluate(plain, data.validation, CLASSES, postprocess=False, progress=False)
    assert trainer.best_step > 0
    assert (after.mean(CLASSES) or 0) > (before.mean(CLASSES) or 0) + 0.2


def test_the_plan_has_the_published_proportions() -> None:
    plan = transfer_method("softmax", published_preprocessing(), 200 * 1081)
    assert (plan.warm_up, plan.validate_every) == (20 * 1081, 10 * 1081)
    assert (plan.learning_rate, plan.weight_decay, plan.voxels) == (1e-4, 1e-5, 96**3)
    assert plan.patience * plan.validate_every > plan.steps, "it never stops early"
    with pytest.raises(UsageError, match="voxels is 0"):
        transfer_method("softmax", GRID, 10, voxels=0)


def test_a_patch_that_does_not_fit_is_refused() -> None:
    odd, small = (replace(GRID, patch_size=size) for size in ((12, 16, 16), (8, 8, 8)))
    with pytest.raises(UsageError, match=r"\(12, 16, 16\) voxels; lite_unet needs multiples of 8"):
        transfer_model(tiny_model(), CLASSES, preprocessing=odd)
    with pytest.raises(UsageError, match="Make one side 16 or more"):
        transfer_model(tiny_model(), CLASSES, preprocessing=small)


@pytest.mark.parametrize(
    "change",
    [{"orientation": "SPL"}, {"spacing_mm": (4.0, 4.0, 5.0)}, {"hu_mean_std": ((0.0, 100.0),)}],
)
def test_what_training_cannot_read_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Training reads scans in RAS, at one spacing"):
        check_trainable(replace(network().config, preprocessing=replace(GRID, **change)))
    check_trainable(network().config)
    config = replace(tiny_model().config, preprocessing=replace(GRID, **change))
    with pytest.raises(UsageError, match="Training reads scans in RAS, at one spacing"):
        TuningRun(UniversalModel(config, torch.ones(3, 8)), Head(), tmp_path)


def test_a_model_without_text_is_not_tuned_by_prompts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Tuning by prompts is not possible with 'tiny'.*text"):
        finetune(network(), "scans", ["sacrum"], output=tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
