"""What a tuning minimises, and the methods by name."""

from math import log

import pytest
import torch
from torch import Tensor

from foundation.errors import UsageError
from foundation.tuning.methods import METHODS, get_method
from foundation.tuning.objective import Forward, distillation, tuning_losses

ALL = torch.ones(2, dtype=torch.bool)


def forward(logits: Tensor, taught: Tensor | None = None, known: bool = True) -> Forward:
    """Two classes, four voxels; the second class is labelled, the first only if `known`."""
    target = torch.tensor([[[1, 0, 0, 0], [0, 1, 1, 0]]]).bool()
    return Forward(logits, target, torch.tensor([[known, True]]), torch.ones(1, 4), taught)


def test_distillation_is_zero_where_both_agree_and_grows_with_the_difference() -> None:
    taught = torch.tensor([[[3.0, -3.0, 0.0, 1.0]]])
    same = forward(torch.cat([taught, torch.zeros(1, 1, 4)], 1), taught, known=False)
    assert float(distillation(same)) == pytest.approx(0, abs=1e-6)
    logits = torch.cat([taught, torch.zeros(1, 1, 4)], 1)
    logits[0, 0, 2] = log(3)  # the old model says 1/2, the new one 3/4
    expected = (log(2) - 0.5 * log(3)) / 4  # the divergence of (1/2, 1/2) from (3/4, 1/4)
    assert float(distillation(forward(logits, taught, known=False))) == pytest.approx(expected)


def test_the_old_model_is_not_asked_about_what_the_scan_labels() -> None:
    taught = torch.full((1, 1, 4), 5.0)
    logits = torch.zeros(1, 2, 4, requires_grad=True)
    assert float(distillation(forward(logits.detach(), taught, known=True))) == 0
    unknown = forward(logits, taught, known=False)
    tuning_losses(unknown, 0.0, exclusive=ALL, distil=0.0)["binary"].sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].abs().sum() == 0, "masked"
    logits.grad = None
    tuning_losses(unknown, 0.0, exclusive=ALL, distil=1.0)["distil"].sum().backward()
    assert logits.grad is not None
    assert (logits.grad[0, 0] < 0).all() and logits.grad[0, 1].abs().sum() == 0


def test_each_scan_has_its_own_terms() -> None:
    """Two scans in a batch are what they are alone: so processes may share a batch."""
    torch.manual_seed(0)
    logits, taught = torch.randn(2, 2, 4), torch.randn(2, 1, 4)
    alone = [forward(logits[i : i + 1], taught[i : i + 1], known=bool(i)) for i in range(2)]
    both = Forward(
        logits,
        alone[0].target.repeat(2, 1, 1),
        torch.tensor([[False, True], [True, True]]),
        torch.ones(2, 4),
        taught,
    )
    terms = tuning_losses(both, 0.3, exclusive=ALL, distil=0.5)
    for i, one in enumerate(alone):
        for name, values in tuning_losses(one, 0.3, exclusive=ALL, distil=0.5).items():
            torch.testing.assert_close(terms[name][i], values[0])


def test_methods_are_named_and_checked() -> None:
    assert get_method("lora", rank=4, steps=None).rank == 4
    with pytest.raises(UsageError, match=r"Unknown method 'lorra'. Choose one of head"):
        get_method("lorra")
    with pytest.raises(UsageError, match="Unknown setting 'ranks'"):
        get_method("lora", ranks=4)
    with pytest.raises(UsageError, match="steps is 0"):
        get_method("full", steps=0)
    with pytest.raises(UsageError, match="Unknown setting 'protect' of method head"):
        get_method("head", protect="mask")
    with pytest.raises(UsageError, match="protect is 'hope'; choose distil, mask or nothing"):
        get_method("full", protect="hope")
    assert [*METHODS] == ["head", "lora", "full", "continual"]
    assert all(name == method.name and method.summary for name, method in METHODS.items())
