"""`finetune`: classes by prompt and a few scans, with what it made the model forget.

    finetune("universal-ct", "scans/", ["vertebra L1"], output="runs/l1", method="head")

OUTPUT receives model/ or adapter/, report.html, report.csv, the splits, and the state from which
an interrupted tuning goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foundation.data.naming import NewClass
from foundation.hub.load import from_pretrained
from foundation.model import UniversalModel
from foundation.tuning.methods import get_method
from foundation.tuning.result import Tuned
from foundation.tuning.run import AFTER, BEFORE, TuningRun


def finetune(
    model: str | Path | UniversalModel,
    data: str | Path,
    classes: Sequence[NewClass | str],
    *,
    output: str | Path,
    method: str = "head",
    test: str | Path | None = None,
    validation: float = 0.2,
    seed: int = 1,
    device: str | torch.device = "auto",
    progress: bool = True,
    **settings: Any,
) -> Tuned:
    """Teach a model classes by prompt and a few scans, and report what that changed.

    Started by `torchrun` or `accelerate launch`, several processes share the work.

    Args:
        model: A name, a folder, org/name on the Hub, or a model; it is not changed.
        data: Labelled scans, see `read_data`.
        classes: To learn, each by its name or as a `NewClass`. A class that the model has is tuned
            further, with its name, channel and colour; any other one is added.
        output: Folder of the run; the same call goes on where an interrupted one stopped.
        method: A name of `METHODS`: head, lora, full or continual.
        test: Scans that are only measured, in the layouts of `data`; else the validation scans are.
        validation: Share of the scans by which the best step is chosen.
        seed: Of splits and training.
        device: auto, cpu, cuda, cuda:1 or mps.
        progress: Show how far it is.
        **settings: Settings of the method, by the fields of its class, such as `steps`,
            `learning_rate` or `protect`; None keeps the method's own value. `protect`, of lora,
            full and continual, says how old classes are kept that a scan does not label: "distil",
            "mask" or "nothing". Two are of all methods: `name`, of the new model or adapter, which
            is made from the folder or the classes if not given; and `tolerance_mm`, of the surface
            Dice, 2.0 if not given.

    Returns:
        The tuned model, its folder, scores and report.

    Raises:
        UsageError: See `TuningRun.read` and `get_method`; or `output` holds another run.
        HubError: The model cannot be found.
        WeightsError: The model is damaged.
        MissingExtraError: An extra is not installed.
    """
    own = {key: settings.pop(key) for key in ("tolerance_mm", "name") if key in settings}
    chosen = get_method(method, **settings)
    base = from_pretrained(model) if isinstance(model, str | Path) else model
    run = TuningRun(base, chosen, Path(output), seed, device, progress=progress, **own)
    run.read(data, classes, test=test, validation=validation)
    before = run.measure(BEFORE)
    run.train()
    return run.finish(before, run.measure(AFTER))
