"""Losses over partially labelled scans."""

from math import log

import pytest
import torch
from torch import Tensor

from foundation.errors import UsageError
from foundation.taxonomy import CLASSES, by_name
from foundation.training.losses import (
    BINARY_WEIGHT,
    EXCLUSIVE,
    masked_loss,
    published_losses,
    scan_losses,
)

K = len(CLASSES)
SPLEEN, LIVER, TUMOR = (by_name(name).index for name in ("spleen", "liver", "liver_tumor"))
KIDNEY = by_name("kidney_right").index


def batch(scans: int = 2, voxels: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(scans, K, voxels, generator=generator, requires_grad=True)
    target = torch.rand(scans, K, voxels, generator=generator) < 0.1
    annotated = torch.rand(scans, K, generator=generator) < 0.5
    weight = (torch.rand(scans, voxels, generator=generator) < 0.7).float()
    return logits, target, annotated, weight


def only(*channels: int) -> Tensor:
    annotated = torch.zeros(1, K, dtype=torch.bool)
    annotated[:, list(channels)] = True
    return annotated


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def test_worked_example() -> None:
    """Two annotated classes, two voxels, the first is spleen and predicted so at 3 to 1."""
    logits = torch.zeros(1, K, 2)
    logits[0, SPLEEN, 0] = log(3)
    target = torch.zeros(1, K, 2, dtype=torch.bool)
    target[0, SPLEEN, 0] = True
    terms = masked_loss(logits, target, only(SPLEEN, KIDNEY), torch.ones(1, 2))
    # Spleen: shares 3/5 and 1/3, overlap 3/5, sum 14/15 + 1. The kidney is absent.
    assert float(terms["dice"]) == pytest.approx(1 - (1.2 + 1) / (14 / 15 + 1 + 1))
    # Three sigmoids at 1/2 and one at 3/4, over two voxels.
    assert float(terms["binary"]) == pytest.approx(0.2 * (3 * log(2) + log(4 / 3)) / 2)
    # Background, spleen, kidney: 1 : 3 : 1 at the first voxel, 1 : 1 : 1 at the second.
    assert float(terms["exclusive"]) == pytest.approx((log(5 / 3) + log(3)) / 2)


def test_classes_not_annotated_get_exactly_no_gradient() -> None:
    logits, target, annotated, weight = batch()
    total(masked_loss(logits, target, annotated, weight)).backward()
    assert logits.grad is not None
    assert not logits.grad[~annotated].any()
    assert (logits.grad[annotated].abs().sum(1) > 0).all()


def test_classes_not_annotated_have_no_influence() -> None:
    logits, target, annotated, weight = batch()
    unknown = ~annotated[..., None].expand_as(target)
    terms = masked_loss(logits, target, annotated, weight)
    changed = masked_loss(logits + 9.0 * unknown, target ^ unknown, annotated, weight)
    assert all(torch.equal(terms[name], changed[name]) for name in terms)


def test_voxels_of_weight_0_have_no_influence() -> None:
    logits, target, annotated, weight = batch()
    total(masked_loss(logits, target, annotated, weight)).backward()
    outside = (weight == 0)[:, None].expand_as(target)
    assert logits.grad is not None
    assert not logits.grad[outside].any()
    terms = masked_loss(logits, target, annotated, weight)
    changed = masked_loss(logits - 5.0 * outside, target ^ outside, annotated, weight)
    for name in terms:
        torch.testing.assert_close(changed[name], terms[name])


def test_a_perfect_prediction_costs_nothing() -> None:
    _, _, annotated, weight = batch()
    target = torch.zeros(2, K, 40, dtype=torch.bool)
    target[:, LIVER, :20] = True
    target[:, TUMOR, :5] = True
    target[:, SPLEEN, 20:30] = True
    perfect = (target.float() * 2 - 1) * 30
    terms = masked_loss(perfect, target, torch.ones_like(annotated), weight)
    assert set(terms) == {"dice", "binary", "exclusive"}
    assert all(0 <= float(value) < 1e-4 for value in terms.values())
    wrong = masked_loss(-perfect, target, torch.ones_like(annotated), weight)
    assert all(float(wrong[name]) > 0.5 for name in terms)


def test_dice_is_of_present_classes_only() -> None:
    logits = torch.zeros(1, K, 8)
    target = torch.zeros(1, K, 8, dtype=torch.bool)
    weight = torch.ones(1, 8)
    nothing = masked_loss(logits, target, only(SPLEEN, KIDNEY), weight)
    assert float(nothing["dice"]) == 0
    assert float(nothing["binary"]) > 0  # which is how absent classes are learnt
    target[0, SPLEEN, :4] = True
    logits[0, KIDNEY] = -100.0
    one = masked_loss(logits, target, only(SPLEEN), weight)["dice"]
    with_absent = masked_loss(logits, target, only(SPLEEN, KIDNEY), weight)["dice"]
    assert float(one) == pytest.approx(float(with_absent))


def test_balance_lets_a_small_class_count_as_much_as_a_large_one() -> None:
    """One voxel of spleen among nine of background; all logits 0, but the spleen's is at 3 to 1."""
    logits = torch.zeros(1, K, 10)
    logits[0, SPLEEN] = log(3)
    target = torch.zeros(1, K, 10, dtype=torch.bool)
    target[0, SPLEEN, 0] = True
    right, wrong = log(4 / 3), log(4)  # what a voxel of spleen costs, and one of background
    for balance, expected in ((0.0, (right + 9 * wrong) / 10), (1.0, (right + wrong) / 2)):
        terms = masked_loss(logits, target, only(SPLEEN), torch.ones(1, 10), balance)
        assert float(terms["exclusive"]) == pytest.approx(expected)


def test_balance_lets_a_small_lesion_count_as_much_as_all_that_is_none() -> None:
    """One voxel of tumour among nine of none; all logits at 3 to 1."""
    logits = torch.full((1, K, 10), log(3))
    target = torch.zeros(1, K, 10, dtype=torch.bool)
    target[0, TUMOR, 0] = True
    right, wrong = log(4 / 3), log(4)  # what a voxel of tumour costs, and one of none
    for balance, raised in ((0.0, 1), (0.5, 3), (1.0, 9)):
        terms = masked_loss(logits, target, only(TUMOR), torch.ones(1, 10), balance)
        expected = BINARY_WEIGHT * (raised * right + 9 * wrong) / 10
        assert float(terms["binary"]) == pytest.approx(expected)


def test_a_lesion_in_an_organ_is_the_organ_to_the_exclusive_term() -> None:
    assert not EXCLUSIVE[TUMOR] and int(EXCLUSIVE.sum()) == 24
    logits = torch.zeros(1, K, 1)
    logits[0, LIVER] = 2.0
    target = torch.zeros(1, K, 1, dtype=torch.bool)
    target[0, [LIVER, TUMOR]] = True
    annotated, weight = only(LIVER, TUMOR, SPLEEN), torch.ones(1, 1)
    expected = -torch.log_softmax(torch.tensor([0.0, 2.0, 0.0]), 0)[1]
    assert masked_loss(logits, target, annotated, weight)["exclusive"] == pytest.approx(expected)
    logits[0, TUMOR] = 5.0
    assert masked_loss(logits, target, annotated, weight)["exclusive"] == pytest.approx(expected)


def test_a_batch_is_the_mean_of_its_scans() -> None:
    logits, target, annotated, weight = batch(scans=3)
    annotated[1] = False  # a scan that says nothing about any class
    together = masked_loss(logits, target, annotated, weight)
    alone = [
        masked_loss(logits[i : i + 1], target[i : i + 1], annotated[i : i + 1], weight[i : i + 1])
        for i in range(3)
    ]
    assert float(total(alone[1]).detach()) == 0
    for name, value in together.items():
        expected = torch.stack([terms[name] for terms in alone]).mean()
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("without", ["annotation", "field of view"])
def test_a_batch_that_says_nothing_can_be_trained_on(without: str) -> None:
    logits, target, annotated, weight = batch()
    (annotated if without == "annotation" else weight).zero_()
    loss = total(masked_loss(logits, target, annotated, weight))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None and not logits.grad.any()


def test_a_voxel_of_weight_3_counts_as_three_voxels() -> None:
    """Loss voxels are drawn more often in small organs and weigh less: no sum may see a square."""
    logits, target, annotated, _ = batch()
    times = torch.randint(1, 4, (logits.shape[2],), generator=torch.Generator().manual_seed(2))
    repeated = torch.arange(logits.shape[2]).repeat_interleave(times)
    weight = times.float().expand(len(logits), -1)
    ones = torch.ones(len(logits), len(repeated))
    once = scan_losses(logits, target, annotated, weight, balance=0.3)
    often = scan_losses(logits[..., repeated], target[..., repeated], annotated, ones, balance=0.3)
    for name in once:
        torch.testing.assert_close(once[name], often[name], rtol=1e-5, atol=1e-6)
    paper, same = (
        published_losses(logits, target, annotated, weight),
        published_losses(logits[..., repeated], target[..., repeated], annotated, ones),
    )
    torch.testing.assert_close(paper["dice"], same["dice"], rtol=1e-5, atol=1e-6)


# --- what may be given ----------------------------------------------------------------------------


def test_volumes_are_what_their_voxels_are() -> None:
    logits, target, annotated, weight = batch(voxels=24)
    for losses in (scan_losses, published_losses):
        flat = losses(logits, target, annotated, weight)
        cubes = (tensor.unflatten(-1, (2, 3, 4)) for tensor in (logits, target, weight))
        in_space, where, weighed = cubes
        for name, values in losses(in_space, where, annotated, weighed).items():
            assert torch.equal(values, flat[name])


def test_any_number_of_classes_can_be_learnt() -> None:
    """Which of them exclude each other is not known: none do, unless it is said."""
    logits, target, annotated, weight = (t[:, :3] if t.dim() > 1 else t for t in batch())
    weight = torch.ones(2, 40)
    found = scan_losses(logits, target, annotated, weight)
    none = torch.zeros(3, dtype=torch.bool)
    for name, values in scan_losses(logits, target, annotated, weight, exclusive=none).items():
        assert torch.equal(values, found[name])
    assert not found["exclusive"].any() and found["binary"].any()
    assert set(masked_loss(logits, target, annotated, weight)) == set(found)


def test_what_does_not_fit_is_refused() -> None:
    logits, target, annotated, weight = batch()
    with pytest.raises(UsageError, match=r"annotated is float32 \(2, 32\); give bool"):
        scan_losses(logits, target, annotated.float(), weight)
    with pytest.raises(UsageError, match=r"Shapes do not fit: .* weight \(2, 39\)"):
        published_losses(logits, target, annotated, weight[:, 1:])
    with pytest.raises(UsageError, match="Shapes do not fit"):
        scan_losses(logits.unflatten(-1, (2, 4, 5)), target, annotated, weight)
    with pytest.raises(UsageError, match="give a bool for each of the 32 classes"):
        scan_losses(logits, target, annotated, weight, exclusive=torch.ones(3, dtype=torch.bool))
