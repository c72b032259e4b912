"""The ways of adapting a model: what each one trains, and with which settings.

head       the network stays; what the new classes have of their own is trained, on cached features
lora       low-rank adapters in the network, and what is new: one small file
full       everything: what `head` trains, and the network more slowly, its first stages most
continual  everything; the old model's masks label the old classes. Reference: Zhang et al., MICCAI
           2023 (arXiv 2306.00988). Deviation: the old classes keep their common head

All but `head` begin as `head` does: where the network followed heads that know nothing yet, it
forgot before they had learnt. Reference: Kumar et al., ICLR 2022 (arXiv 2202.10054).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from foundation.errors import UsageError

Protection = Literal["distil", "mask", "nothing"]


@dataclass(frozen=True)
class Method:
    """One way of adapting a model, and its settings.

    name: key of `METHODS`. branch: what new classes have of their own, see `config.BranchSpec`.
    width: of the side decoder. probe: steps before all others, in which the branch alone is
    trained, as by `head`.
    trains: "branch" (and nothing else), "adapter" (and the branch) or "all".
    protects: how old classes that a scan does not label are kept: `distil` (the old model's
    probabilities are their target), `mask` (their losses are masked, nothing else), or `nothing`
    (they count as absent: what a careless user does).
    pseudo_labels: the old model's masks, cleaned up, label the old classes.
    steps, batch_size: of optimiser steps, at most; training stops when `patience` validations, one
    each `validate_every` steps, have brought nothing. learning_rate: of what is new;
    backbone_rate: its share for what was trained before; layer_decay: see `OptimizerConfig`.
    distil: weight of that term. rank: of the adapters. voxels: a loss looks at.
    windows: most windows of all scans whose features are cached.
    """

    name: str
    branch: Literal["prompt", "head", "side"]
    trains: Literal["branch", "adapter", "all"]
    protects: Protection = "distil"
    pseudo_labels: bool = False
    probe: int = 0
    width: int = 16
    steps: int = 400
    batch_size: int = 1
    validate_every: int = 50
    patience: int = 3
    learning_rate: float = 1e-3
    backbone_rate: float = 1.0
    layer_decay: float = 1.0
    weight_decay: float = 1e-5
    warm_up: int = 10
    distil: float = 1.0
    balance: float = 0.3
    rank: int = 2
    voxels: int = 32768
    windows: int = 48
    save_every: int = 25

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every", "patience", "rank", "windows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.learning_rate <= 0:
            raise UsageError(f"learning_rate is {self.learning_rate}; it must be above 0.")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            *("head", "side", "branch"),
            width=24,
            learning_rate=5e-3,
            balance=0.5,
            steps=480,
            validate_every=60,
        ),
        Method(
            *("lora", "side", "adapter"),
            probe=360,
            steps=150,
            width=5,  # the file stays below 2 % of the model
            rank=1,
            learning_rate=2e-3,
            backbone_rate=0.25,
            balance=0.5,
        ),
        Method(
            *("full", "side", "all"),
            probe=360,
            steps=150,
            width=24,
            learning_rate=2e-3,
            backbone_rate=0.025,
            layer_decay=0.8,
            balance=0.5,
        ),
        Method(
            *("continual", "side", "all", "mask"),
            pseudo_labels=True,
            probe=360,
            steps=150,
            width=24,
            learning_rate=2e-3,
            backbone_rate=0.015,  # at 0.025 the old classes lost 0.012 in 150 steps
            balance=0.5,
        ),
    )
}


def get_method(name: str, **changes: Any) -> Method:
    """The method of this name, with some of its settings changed; None changes nothing.

    Raises:
        UsageError: no such method or setting, or a value that is not allowed.
    """
    if name not in METHODS:
        raise UsageError(f"Unknown method {name!r}. Choose one of {', '.join(METHODS)}.")
    given = {key: value for key, value in changes.items() if value is not None}
    allowed = set(Method.__dataclass_fields__) - {"name"}
    if unknown := sorted(set(given) - allowed):
        raise UsageError(
            f"Unknown setting {unknown[0]!r} of method {name}. Allowed: "
            f"{', '.join(sorted(allowed))}."
        )
    return replace(METHODS[name], **given)
