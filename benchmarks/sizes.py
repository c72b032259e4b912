"""What the smoke, mini and real sizes mean: seeds, steps, patches and settings of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Training in the mini size: small enough for two CPU cores, by the embedded weights' loss, with
# which a network learns classes early. The real size has the paper's own settings
# (configs/unet.yaml).
MINI: Mapping[str, Any] = {
    "model.backbone": "lite_unet",
    "model.backbone_options": {"widths": [12, 24, 48, 96], "full": 16},
    "model.text": "minilm",
    "model.standardise_text": True,
    "optimizer": {
        "learning_rate": 3e-3,
        "head_learning_rate": 1e-3,  # at 3e-3 the generated layers become unstable
        "weight_decay": 1e-4,
        "clip_norm": 5,
    },
    "schedule": {"kind": "trapezoid", "warm_up": 30, "decay": 0.6},
    "loss": {
        "dice": 1,
        "binary": 0.2,
        "exclusive": 1,
        "balance": 0.5,
        "auxiliary": 1,
        "sample_voxels": 8192,
    },
    "validation.every": 0,
    "workers": 0,
    "save_every": 200,
}
SMOKE: Mapping[str, Any] = {
    **MINI,
    "model.backbone_options": {"widths": [8, 16], "full": 16},
    "schedule": {"kind": "trapezoid", "warm_up": 0, "decay": 0.5},
}


@dataclass(frozen=True)
class Plan:
    """What a size means for an experiment.

    Attributes:
        seeds: Each arm is run with each.
        steps: Of one training; None for as many as the configuration says.
        patch: Voxels along each axis of a training patch; None as the configuration says.
        settings: Dotted key of the training configuration → value.
        options: What only the script itself knows, such as numbers of scans.
    """

    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int | None = None
    patch: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def plans(
    *,
    mini_steps: int = 2000,
    mini: Mapping[str, Any] | None = None,
    smoke: Mapping[str, Any] | None = None,
    real: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (1, 2, 3),
) -> dict[str, Plan]:
    """Return the usual plans of the three sizes.

    Args:
        mini_steps: Of a training.
        mini, smoke, real: The script's own options.
        seeds: Of the mini size.
    """
    return {
        "smoke": Plan((1,), 2, 16, SMOKE, smoke or {}),
        "mini": Plan(tuple(seeds), mini_steps, 32, MINI, mini or {}),
        "real": Plan((1,), None, None, {}, real or {}),
    }
