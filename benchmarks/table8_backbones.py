"""Table 8: the mean Dice by backbone, all of them under one protocol.

    python benchmarks/table8_backbones.py --smoke
    python benchmarks/table8_backbones.py --mini
    python benchmarks/table8_backbones.py 01=BTCV 04=LiTS 05=KiTS … -o OUT     # real data
    … --only backbone=unet

Protocol
- Data. Real: the paper's datasets, as many as are given. Generated: ten partly labelled ones.
- Split. Real: fold 0 of five is held out and measured. Generated: 24 scans of other bodies, with
  all classes labelled.
- Arms: all our backbones. Real: in their published widths, which differ in cost. Generated: each as
  narrow as makes a window cost the same number of operations, as near as its widths allow.
- Operations: torch's counter on a window of the training's size, backbone and head; a multiply-add
  is two. The table shows them, the parameters and the seconds of a forward and backward pass.
- Patch: 64×64×32 voxels in the mini size. Swin UNETR takes no side below 32 and needs one of 64.
- Network's head, prompts, data, samples, loss, steps and seeds are the same in all arms.
- Metric: Dice of each class where a scan shows it, on the scan's own grid; the mean over scans,
  then over 25 organs and 6 tumours. The kidney cyst is trained and is not in the mean.
- Statistic: differences on the same scans, with a bootstrap over seeds and scans.
- Paper: U-Net 76.73, Swin UNETR 76.11 (grade 2); DiNTS and U-Net++ are unknown (U).

Hardware. Real: each arm is one pretraining with the paper's settings, whose memory and hours
pretraining_cost.py tells on your machine; the paper had 8 × RTX A5000. Mini: two
CPU cores, up to three hours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Any

import torch
from costs import device_of, flops, parameters, seconds_of, spread, universal_model
from lab import Lab, run_script
from plots import bars, by_seed
from runs import Run
from sizes import plans

from foundation import BACKBONES, CLASSES, UniversalModel
from foundation.evaluation import Figure

MEASURED = [each.name for each in CLASSES if each.name != "kidney_cyst"]
Widths = Iterator[dict[str, Any]]


def _widths(option: str, first: int, step: int) -> Callable[[], Widths]:
    return lambda: ({option: width} for width in range(first, 129, step))


# Backbone → its options from narrow to wide.
NARROW: dict[str, Callable[[], Widths]] = {
    "dints": _widths("width", 4, 2),
    "lite_unet": lambda: (
        {"widths": [width * times for times in (1, 2, 4, 8)], "full": 16} for width in range(4, 97)
    ),
    "mednext": _widths("width", 4, 2),
    "segresnet": _widths("init_filters", 4, 2),
    "swin_unetr": _widths("feature_size", 12, 12),
    "unet": _widths("width", 4, 1),
    "unetpp": _widths("width", 4, 1),
}
# `like`: the others cost as much as this one at its narrowest. Swin UNETR's is the costliest.
PLANS = plans(
    mini_steps=450,
    mini={"backbones": sorted(BACKBONES), "patch": (64, 64, 32), "like": "swin_unetr"},
    smoke={"backbones": ["lite_unet", "segresnet"], "patch": (64, 32, 32), "like": "segresnet"},
    real={"backbones": sorted(BACKBONES)},
)


def cost_of(backbone: str, patch: tuple[int, ...], options: dict[str, Any]) -> int:
    """Count the operations of a window."""
    return flops(universal_model(backbone, [c.name for c in CLASSES], patch, options), patch)


def options_of_cost(backbone: str, patch: tuple[int, ...], target: int) -> dict[str, Any]:
    """Find the width at which a window costs nearest to so many operations.

    Args:
        backbone: A key of `NARROW`.
        patch: Of the window.
        target: Operations.

    Returns:
        The backbone's options.
    """
    best: tuple[float, dict[str, Any]] = (float("inf"), {})
    for options in NARROW[backbone]():
        cost = cost_of(backbone, patch, options)
        best = min(best, (abs(cost - target), options), key=lambda each: each[0])
        if cost > target:
            break
    return best[1]


def step_seconds(model: UniversalModel, device: torch.device, batch: int = 2) -> list[float]:
    """Measure forward and backward pass of a batch, without loss and optimiser: 3 times.

    Args:
        model: Trained or not; it is moved to the device.
        device: What to compute on.
        batch: Patches.
    """
    given = model.to(device).train().config.preprocessing
    image = torch.rand(batch, given.channels, *given.patch_size, device=device)
    voxels = torch.randint(image[0, 0].numel(), (batch, 8192), device=device)

    def step() -> None:
        model.logits_at(image, voxels)[0].square().mean().backward()

    return seconds_of(step, 3, device)


def measure(run: Run) -> Iterable[Figure]:
    """Train one backbone and measure what it learnt and what it costs."""
    lab, backbone = run.lab, str(run.arm["backbone"])
    if lab.generated:
        patch = tuple(lab.plan.options["patch"])
        first = next(NARROW[lab.plan.options["like"]]())
        options = options_of_cost(backbone, patch, cost_of(lab.plan.options["like"], patch, first))
        changes: dict[str, Any] = {"stages.0.patch_size": list(patch)}
        changes |= {"model.backbone": backbone, "model.backbone_options": options}
        model = run.pretrain(changes)
    elif backbone == "swin_unetr":  # with the options of its own configuration
        model = run.pretrain(config="swin_unetr", fold=lab.data.fold)
    else:
        model = run.pretrain({"model.backbone": backbone}, config="unet", fold=lab.data.fold)
    scores = run.score(model, lab.data.tests(fold=lab.data.fold))
    given = model.config.preprocessing
    count, seconds = parameters(model), step_seconds(model, device_of(run.cpu))
    return [
        *run.figures(scores, [name for name in MEASURED if name in scores.classes]),
        Figure("parameters", count / 1e6, "M"),
        Figure("flops", flops(model, given.patch_size, given.channels) / 1e9, "G"),
        spread("seconds a step", seconds),
    ]


def main() -> None:
    """Run all backbones, compare each two, draw the picture."""
    lab = Lab.parse(__doc__, PLANS)
    arms = list(lab.arms({"backbone": lab.plan.options["backbones"]}))
    for arm in arms:
        lab.measure(arm, measure)
    for first, second in combinations(arms, 2):
        question = f"{first['backbone']} or {second['backbone']}?"
        lab.verdict(question, first, second, classes=None if lab.generated else MEASURED)
    groups = {
        str(arm["backbone"]): {"Dice": by_seed(lab.records(), "dice/mean", arm)} for arm in arms
    }
    lab.finish([bars(lab.output / "dice.png", groups, "mean Dice", "Backbones")])


if __name__ == "__main__":
    run_script(main)
