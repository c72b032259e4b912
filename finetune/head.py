"""head: the network stays as it is, and new classes get something small of their own.

    python finetune/head.py DATA "vertebra L1" "vertebra L2" -o runs/lumbar [--test DIR]

What they get is a branch: a small decoder over the encoder's features, beside the network's own,
and a text-driven head that starts as a copy of the model's. Nothing else is trained. So the old
classes cannot change, bit for bit, and the network has to see each window only once: its features
are kept, and a step computes the branch alone.

DATA: see `universal-ct add-class --help`, which does the same and goes on after an interruption.
Where the files call a class otherwise, or it is to have a sentence of its own, edit `NewClass(…)`.

Hardware: two CPU cores are enough. Measured: see benchmarks/README.md.
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
from foundation.hardware import keep_freed_memory
from foundation.inference.predict import choose_device
from foundation.training.sample import PatchGrid
from foundation.tuning.data import Split, read_data
from foundation.tuning.feeds import CachedFeed, cache_patches, cache_windows
from foundation.tuning.finetune import specs_of
from foundation.tuning.objective import tuning_losses
from foundation.tuning.recipe import settings_of, write_results
from foundation.tuning.samples import FewScans
from foundation.tuning.setup import exclusive_of


@dataclass(frozen=True)
class Settings:
    """What can be set: each field is an option of the command line, or its operand.

    width: channels of the small decoder. windows: of all scans, whose features are kept. voxels: of
    a patch, that the loss looks at. balance: how far the loss raises small classes, see
    `scan_losses`. patience: validations without a gain, after which it ends. validation: share of
    the scans, where DATA does not say which. test: scans that are only measured.
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
    windows: int = 48
    voxels: int = 32768
    steps: int = 480
    validate_every: int = 60
    patience: int = 3
    learning_rate: float = 5e-3
    weight_decay: float = 1e-5
    warm_up: int = 10
    balance: float = 0.5


def main(given: Sequence[str] | None = None) -> None:
    """Read the command line, learn."""
    smoke = {"steps": 2, "validate_every": 2, "windows": 4, "voxels": 4096}
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

    # 3. What the frozen network sees: half as inference will show it, half turned and stretched.
    pre, half = model.config.preprocessing, settings.windows // 2
    grid = PatchGrid(
        pre.patch_size, pre.spacing_mm[0], pre.hu_windows, settings.voxels, model.classes
    )
    scans = FewScans(data.train, data.names)
    plain = cache_windows(model, data.train, data.names, half, device)
    varied = cache_patches(model, scans, grid, settings.windows - half, settings.seed, device)
    feed = CachedFeed(model, [*plain, *varied], data.names, settings.voxels, settings.seed, device)
    own_scans = data.validation != data.train
    held_out = cache_windows(model, data.validation, data.names, 12, device) if own_scans else plain

    # 4. The branch learns. An organ excludes another one: a voxel has one of the new ones at most.
    exclusive = exclusive_of(data.names, data.names, model).to(device)
    model.requires_grad_(False)
    branch = model.branches[-1].requires_grad_(True)
    optimizer = torch.optim.AdamW(branch.parameters(), weight_decay=settings.weight_decay)
    curve: list[tuple[int, float]] = []
    best, best_step, state = -1.0, 0, {}
    for step in trange(settings.steps + 1, desc="head", unit="step"):
        if step % settings.validate_every == 0 or step == settings.steps:
            found = feed.dice(held_out)
            curve.append((step, sum(found.values()) / max(1, len(found))))
            if curve[-1][1] > best:
                best, best_step, state = curve[-1][1], step, copy.deepcopy(branch.state_dict())
            stale = (step - best_step) // settings.validate_every
            if step == settings.steps or stale >= settings.patience:
                break
        rise = min(1.0, (step + 1) / max(1, settings.warm_up))
        share = rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        balance = settings.balance * share
        terms = tuning_losses(feed(step), balance, exclusive=exclusive, distil=0)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        nn.utils.clip_grad_norm_(branch.parameters(), 5.0)
        optimizer.step()
    branch.load_state_dict(state)

    # 5. What it learnt, and what it forgot.
    after = evaluate(model.eval(), measured, compared, masks=masks / "after", keep=compared)
    model.config = replace(model.config, name=settings.output.name)
    save_pretrained(model, settings.output / "model", dtype=torch.float16)
    write_results("head", settings, base, data, before, after, curve, expected)


if __name__ == "__main__":
    main()
