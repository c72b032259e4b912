"""full: everything is trained, what was trained before more slowly, the first stages most slowly.

    python finetune/full.py DATA "vertebra L1" "vertebra L2" -o runs/lumbar [--test DIR]

The new classes get a small decoder and a head of their own and learn alone first, as by head.py.
Then everything learns: backbone and old head at 0.025 of the rate, each stage of the backbone at
0.8 of the stage above. Nothing but the old model keeps the old classes: where the scans do not
label them, its probabilities are their target. Without it (`--distil 0`) they are not looked at
at all, and drift. Reference: Kumar et al., ICLR 2022 (arXiv 2202.10054).

DATA: see `universal-ct add-class --help`, which does the same and goes on after an interruption.
Where the files call a class otherwise, or it is to have a sentence of its own, edit `NewClass(…)`.

Hardware: one GPU; on two CPU cores a step takes seconds. Measured: see benchmarks/README.md.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import trange

from foundation import NewClass, from_pretrained, save_pretrained
from foundation.adapting.classes import add_classes
from foundation.evaluation.scores import evaluate
from foundation.evaluation.validation import mean_dice, validate
from foundation.hardware import autocast, keep_freed_memory
from foundation.inference.predict import choose_device
from foundation.training.depth import rate_factors
from foundation.training.mixture import Mixture
from foundation.training.sample import PatchGrid
from foundation.tuning.data import Split, read_data
from foundation.tuning.feeds import PatchFeed, fast
from foundation.tuning.finetune import specs_of
from foundation.tuning.objective import tuning_losses
from foundation.tuning.recipe import settings_of, write_results
from foundation.tuning.samples import FewScans
from foundation.tuning.setup import exclusive_of, probe


@dataclass(frozen=True)
class Settings:
    """What can be set: each field is an option of the command line, or its operand.

    width: channels of the small decoder. probe: steps in which it learns alone. backbone_rate:
    share of the rate, for what was trained before; layer_decay: of that, for each stage of the
    backbone. distil: weight of what the old model says, 0 for nothing. voxels: of a patch, that the
    loss looks at. balance: how far the loss raises small classes, see `scan_losses`. patience:
    validations without a gain, after which it ends. validation: share of the scans, where DATA
    does not say which. test: scans that are only measured.
    """

    data: Path
    classes: tuple[str, ...]
    output: Path
    test: Path | None = None
    model: str = "universal-ct"
    device: str = "auto"
    seed: int = 1
    validation: float = 0.2
    width: int = 24
    probe: int = 360
    backbone_rate: float = 0.025
    layer_decay: float = 0.8
    distil: float = 1.0
    batch_size: int = 1
    patch: int = 0
    voxels: int = 32768
    steps: int = 150
    validate_every: int = 50
    patience: int = 3
    learning_rate: float = 2e-3
    weight_decay: float = 1e-5
    warm_up: int = 10
    balance: float = 0.5


def main(given: Sequence[str] | None = None) -> None:
    """Read the command line, learn."""
    smoke = {"steps": 2, "probe": 2, "validate_every": 2, "patch": 64, "voxels": 4096}
    with settings_of(Settings, __doc__, given, smoke=smoke) as settings:
        learn(settings)


def learn(settings: Settings) -> None:
    """Data, model, what is trained, the loop, evaluation, files."""
    # 1. Scans: some to learn from, others to choose the best step by, all on the model's grid.
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()  # half of a step's time
    base = from_pretrained(settings.model)
    wanted = [NewClass(name) for name in settings.classes]
    data = read_data(
        settings.data,
        classes=wanted,
        work=settings.output / "data",
        spacing_mm=base.config.preprocessing.spacing_mm[0],
        test=settings.test,
        split=Split(settings.validation, settings.seed),
        old_classes=base.classes,
        workers=1,
    )

    # 2. The model with the new classes, untrained, and what is to be expected of them.
    model = copy.deepcopy(base)
    torch.manual_seed(settings.seed)
    expected = add_classes(model, specs_of(base, wanted), kind="side", width=settings.width)
    print(*expected, sep="\n", file=sys.stderr)
    measured, compared = data.test or data.validation, (*data.names, *base.classes)
    masks, model = settings.output / "masks", model.to(device)
    before = evaluate(model, measured, compared, masks=masks / "before", keep=base.classes)

    # 3. The new parts alone first, on cached features, as in head.py: where the network followed
    # heads that know nothing yet, it forgot before they had learnt.
    probe(
        *(model, base, data, settings.probe, settings.output / "tuning"),
        voxels=settings.voxels,
        balance=settings.balance,
        seed=settings.seed,
        device=device,
    )

    # 4. Patches, turned and stretched. The old model is asked about the same voxels.
    pre = model.config.preprocessing
    size = (settings.patch,) * 3 if settings.patch else pre.patch_size
    grid = PatchGrid(size, pre.spacing_mm[0], pre.hu_windows, settings.voxels, model.classes)
    scans = FewScans(data.train, data.names)
    teacher = base.to(device).eval() if settings.distil else None
    feed = PatchFeed(
        model, Mixture([scans], settings.seed), grid, settings.batch_size, teacher, device
    )

    def validation() -> dict[str, float]:
        with autocast(device, fast(model, grid.size, device)):
            totals = validate(model.eval(), data.validation, 0.25, data.names)
        model.train()
        return mean_dice(totals, model.classes)[0]

    # 5. All of it learns. An organ excludes another one: a voxel has at most one.
    exclusive = exclusive_of(model.classes, data.names, model).to(device)
    depth = rate_factors(model.backbone, len(pre.hu_windows), settings.layer_decay)
    groups = []
    for name, parameter in model.named_parameters():
        share = settings.backbone_rate * depth.get(name.removeprefix("backbone."), 1.0)
        share = 1.0 if name.startswith("branches.") else share
        groups.append({"params": [parameter], "full_lr": settings.learning_rate * share})
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    curve: list[tuple[int, float]] = []
    best, best_step, state = -1.0, 0, {}
    for step in trange(settings.steps + 1, desc="full", unit="step"):
        if step % settings.validate_every == 0 or step == settings.steps:
            found = validation()
            curve.append((step, sum(found.values()) / max(1, len(found))))
            if curve[-1][1] > best:
                best, best_step, state = curve[-1][1], step, copy.deepcopy(model.state_dict())
            stale = (step - best_step) // settings.validate_every
            if step == settings.steps or stale >= settings.patience:
                break
        rise = min(1.0, (step + 1) / max(1, settings.warm_up))
        share = rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * share
        balance = settings.balance * share
        terms = tuning_losses(feed(step), balance, exclusive=exclusive, distil=settings.distil)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    model.load_state_dict(state)

    # 6. What it learnt, and what it forgot.
    after = evaluate(model.eval(), measured, compared, masks=masks / "after", keep=compared)
    model.config = replace(model.config, name=settings.output.name)
    save_pretrained(model, settings.output / "model", dtype=torch.float16)
    write_results("full", settings, base, data, before, after, curve, expected)


if __name__ == "__main__":
    main()
