"""bfloat16 is used where a processor has instructions for it, and nowhere else."""

from pathlib import Path

import pytest
import torch

from foundation.errors import UsageError
from foundation.hardware import autocast, computes_bfloat16, trains_in_bfloat16
from foundation.pretraining.run import pretrain
from foundation.training.trainer import accelerator_for


@pytest.mark.parametrize("able", [True, False])
def test_a_cpu_computes_in_what_it_has_instructions_for(
    able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able, raising=False)
    assert computes_bfloat16("cpu") is able
    with autocast("cpu", computes_bfloat16("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if able else torch.float32)


def test_coarse_grids_whose_gradients_are_wrong_stay_in_single_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert trains_in_bfloat16("cpu", (3, 4, 3)) and not trains_in_bfloat16("cpu", (3, 2, 3))
    coarse = "stages=[{steps: 1, patch_size: 64, spacing_mm: 4, batch_size: 1}]"
    given = ["precision=bfloat16", "sources=[{kind: phantoms}]", coarse, "validation.hold_out=[]"]
    with pytest.raises(UsageError, match=r"2 voxels at its coarsest level.*Give 96 or more"):
        pretrain("universal-ct", output=tmp_path, overrides=given, cpu=True, progress=False)
    assert not list(tmp_path.iterdir())


def test_an_old_torch_or_another_device_stays_in_single_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert not computes_bfloat16("cpu") and not computes_bfloat16("mps")


def test_pretraining_does_not_start_where_it_would_take_forever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("foundation.training.trainer.computes_bfloat16", lambda _: False)
    with pytest.raises(UsageError, match="Add precision=float32"):
        accelerator_for("bfloat16", "cpu")
