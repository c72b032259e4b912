"""A method, a model and scans, made into a `Tuner`: what is trained, on what, against what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foundation.adapting.low_rank import has_adapters
from foundation.evaluation.validation import mean_dice, validate
from foundation.files import recover_folder
from foundation.hardware import autocast
from foundation.model import UniversalModel
from foundation.taxonomy import NAMES
from foundation.training.depth import rate_factors
from foundation.training.losses import EXCLUSIVE
from foundation.training.mixture import Mixture
from foundation.training.sample import PatchGrid
from foundation.tuning.data import TuningData
from foundation.tuning.feeds import CachedFeed, Feed, PatchFeed, cache_patches, cache_windows, fast
from foundation.tuning.methods import METHODS, Method
from foundation.tuning.objective import tuning_losses
from foundation.tuning.samples import FewScans, pseudo_labels
from foundation.tuning.tuner import LAST, Parameters, Tuner

PROBE = "probe"
_VALIDATION_OVERLAP = 0.25
_VALIDATION_WINDOWS = 12  # that are cached


def build_tuner(
    model: UniversalModel,
    base: UniversalModel,
    data: TuningData,
    method: Method,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    progress: bool = True,
) -> Tuner:
    """The tuning of `model`, which has the new classes already (and the adapter, for `lora`).

    base: the model as it was, the teacher. The data's new classes are the model's last.

    Raises:
        UsageError: no training scan shows a new class, or `folder` holds another tuning.
    """
    new = data.names
    parameters = trained_parameters(model, method)
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name in parameters.tensors)
    exclusive = exclusive_of(model.classes, new, model)
    if method.trains == "branch":
        feed, check = _cached(model, data, new, method, seed, device, progress)
        exclusive = exclusive[-len(new) :]
    else:
        feed, check = _patches(model, base, data, new, method, seed, device, progress)
    return Tuner(
        model,
        parameters,
        feed,
        partial(tuning_losses, exclusive=exclusive.to(device), distil=method.distil),
        method,
        check,
        folder,
        identity(base, data, new, method, seed),
        progress=progress,
    )


def probe(
    model: UniversalModel,
    base: UniversalModel,
    data: TuningData,
    steps: int,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    progress: bool = True,
    **settings: Any,
) -> None:
    """Train the branch of the new classes alone, in place, as `head` does; resumable.

    folder: of the tuning that follows. Nothing is done where it holds a state of that one, which
    has the branch as well. settings: of `Method`, in place of those of `head`.

    Raises:
        UsageError: as `build_tuner`.
    """
    recover_folder(folder / LAST)
    if (folder / LAST).is_dir():
        return
    asked = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    head = replace(METHODS["head"], steps=steps, **settings)
    options: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    build_tuner(model, base, data, head, folder / PROBE, **options).train()
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(asked[name])


def trained_parameters(model: UniversalModel, method: Method) -> Parameters:
    """What a method trains, by name, and how fast."""
    tensors: dict[str, nn.Parameter] = {}
    rates: dict[str, float] = {}
    depth: dict[str, float] = {}
    if method.trains == "all":
        channels = len(model.config.preprocessing.hu_windows)
        depth = rate_factors(model.backbone, channels, method.layer_decay)
    adapted = has_adapters(model)
    for name, tensor in model.named_parameters():
        rate = method.learning_rate
        is_new = name.startswith("branches.")
        if method.trains == "adapter":
            if not tensor.requires_grad:  # `add_adapter` has chosen
                continue
            rate *= 1.0 if is_new else method.backbone_rate
        elif method.trains == "branch":
            # With an adapter the branch's head is one too: the rest of it is not stored.
            if not is_new or (adapted and not tensor.requires_grad):
                continue
        elif name.startswith("backbone."):
            rate *= method.backbone_rate * depth[name.removeprefix("backbone.")]
        elif not is_new:
            rate *= method.backbone_rate
        tensors[name], rates[name] = tensor, rate
    return Parameters(tensors, rates)


def exclusive_of(classes: Sequence[str], new: Sequence[str], model: UniversalModel) -> Tensor:
    """Classes of which a voxel has at most one, bool (K,): organs, new ones without a parent."""
    known = dict(zip(NAMES, EXCLUSIVE.tolist(), strict=True))
    parents = {spec.name: spec.parent for spec in model.config.classes}
    return torch.tensor(
        [parents[name] is None if name in new else known.get(name, False) for name in classes]
    )


def identity(
    base: UniversalModel, data: TuningData, new: Sequence[str], method: Method, seed: int
) -> dict[str, object]:
    """What a resumed tuning must agree in; the number of steps may change."""
    settings = asdict(method)
    for free in ("save_every", "patience"):
        settings.pop(free)
    state = hashlib.sha256()
    for name, value in sorted(base.state_dict().items()):
        state.update(name.encode())
        state.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return {
        "model": state.hexdigest(),
        "data": data.digest,
        "classes": list(new),
        "method": json.loads(json.dumps(settings)),
        "seed": seed,
    }


Check = Callable[[], dict[str, float]]


def _cached(
    model: UniversalModel,
    data: TuningData,
    new: Sequence[str],
    method: Method,
    seed: int,
    device: torch.device,
    progress: bool,
) -> tuple[Feed, Check]:
    plain = cache_windows(model, data.train, new, method.windows // 2, device, progress)
    varied = cache_patches(
        model,
        FewScans(data.train, tuple(new)),
        _grid(model, method),
        method.windows - method.windows // 2,
        seed,
        device,
        progress,
    )
    same = {case.key for case in data.validation} == {case.key for case in data.train}
    held_out = (
        plain
        if same
        else cache_windows(model, data.validation, new, _VALIDATION_WINDOWS, device, progress)
    )
    feed = CachedFeed(model, [*plain, *varied], new, method.voxels, seed, device)
    return feed, lambda: feed.dice(held_out)


def _grid(model: UniversalModel, method: Method) -> PatchGrid:
    pre = model.config.preprocessing
    return PatchGrid(
        pre.patch_size, pre.spacing_mm[0], pre.hu_windows, method.voxels, model.classes
    )


def _patches(
    model: UniversalModel,
    base: UniversalModel,
    data: TuningData,
    new: Sequence[str],
    method: Method,
    seed: int,
    device: torch.device,
    progress: bool,
) -> tuple[Feed, Check]:
    old = base.classes
    base = base.to(device).eval()
    pseudo = pseudo_labels(base, data.train, old, progress) if method.pseudo_labels else {}
    scans = FewScans(
        data.train,
        tuple(new),
        absent=old if method.protects == "nothing" else (),
        pseudo=pseudo,
    )
    teacher = base if method.protects == "distil" else None
    mixture = Mixture([scans], seed)
    feed = PatchFeed(model, mixture, _grid(model, method), method.batch_size, teacher, device)

    def check() -> dict[str, float]:
        model.eval()
        with autocast(device, fast(model, model.config.preprocessing.patch_size, device)):
            totals = validate(model, data.validation, _VALIDATION_OVERLAP, tuple(new))
        model.train()
        return mean_dice(totals, model.classes)[0]

    return feed, check
