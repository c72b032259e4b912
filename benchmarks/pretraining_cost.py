"""What a pretraining with the paper's settings costs: memory, steps a second, projected hours.

    python benchmarks/pretraining_cost.py --smoke
    python benchmarks/pretraining_cost.py --mini
    python benchmarks/pretraining_cost.py -o OUT    # the real size: no data, a GPU if any
    torchrun --nproc-per-node 8 benchmarks/pretraining_cost.py -o OUT
    … --batch 3 --only backbone=unet --set precision=bfloat16

Protocol
- Networks and settings: configs/unet.yaml and configs/swin_unetr.yaml as they are: patches of 96³
  voxels at 1.5 mm, BCE and Dice on every voxel, AdamW, single precision. Prompts are MiniLM's in
  the place of CLIP's, which would be a download. No text is encoded in training, so that changes
  the first layer of the head alone: 384 numbers a prompt, not 512.
- Data: generated bodies. A sample is made before each step and its time is not counted;
  throughput.py measures whether a machine's workers keep up.
- Measured: ten steps after one that is not counted; median, fastest and slowest of them.
- Batch: 6 for each process, as in the paper; --batch for less memory. Mini: 1.
- Memory: the peak in a fresh process, beyond what was in use before. On a GPU what torch allocates.
- Projected: the schedule's patches (steps × 6 × 8 processes) × seconds of a patch. So a smaller
  batch is taken to cost as much a patch. `device hours` are those of one GPU, or of this CPU;
  `days` are those of 8 such devices.
- Paper: 8 × RTX A5000, batch 6 each. Its epochs, and so its hours, are unknown (U). The
  schedule is that of our configuration: 2,000 epochs, as the published code's.

Hardware. Real: any GPU on which the batch fits; what does not fit says so. Minutes. Mini: two CPU
cores, 24 GB of memory, about 20 minutes. An interrupted run goes on with the next network.
"""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from costs import Memory, alone, parameters, spread
from lab import MAIN_PROCESS, Lab, run_script
from plots import bars, by_seed
from runs import Run
from sizes import Plan
from tqdm import tqdm

from foundation import UsageError, keep_freed_memory
from foundation.evaluation import Figure
from foundation.pretraining import Pretraining, load_config
from foundation.training import accelerator_for

PAPER_BATCH, PAPER_DEVICES = 6, 8
BACKBONES = ("unet", "swin_unetr")
SMALL: Mapping[str, Mapping[str, Any]] = {
    "unet": {"model.backbone_options": {"width": 8}, "stages.0.patch_size": 16},
    "swin_unetr": {"model.backbone_options": {"feature_size": 12}, "stages.0.patch_size": 64},
}
PLANS = {
    "smoke": Plan(steps=2, options={"batch": 1, "small": True, "backbones": ["unet"]}),
    "mini": Plan(steps=10, options={"batch": 1, "small": False, "backbones": BACKBONES}),
    "real": Plan(steps=10, options={"batch": PAPER_BATCH, "small": False, "backbones": BACKBONES}),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the batch size."""
    parser.add_argument("--batch", type=int, help="patches of one process in a step")


def settings(lab: Lab, backbone: str, batch: int) -> list[str]:
    """Return what is changed in the configuration of a backbone, as "key=value"."""
    found = ["model.text=minilm", "sources=[{kind: phantoms, count: 1}]", "workers=0"]
    found += ["validation.fold=null", f"stages.0.batch_size={batch}"]
    if lab.plan.options["small"]:
        found += [f"{key}={value}" for key, value in SMALL[backbone].items()]
    return [*found, *lab.given.settings]


def projected_hours(seconds: float, batch: int, steps: int) -> float:
    """Return the hours that one device would take for the patches of the schedule.

    Args:
        seconds: Of a step.
        batch: Patches of one process in it.
        steps: Of the schedule.
    """
    return steps * PAPER_BATCH * PAPER_DEVICES * seconds / batch / 3600


def time_steps(config: str, overrides: list[str], steps: int, cpu: bool) -> list[Figure]:
    """Take some steps of a pretraining; run in a fresh process.

    Args:
        config: A shipped configuration.
        overrides: Of it.
        steps: That are measured.
        cpu: Leave GPUs alone.

    Raises:
        UsageError: The memory of the GPU is too small.
    """
    loaded = load_config(config, overrides)
    accelerator = accelerator_for(loaded.precision, "cpu" if cpu else None)
    device, batch = accelerator.device, loaded.stages[0].batch_size
    memory = Memory(device)
    if device.type == "cpu":
        keep_freed_memory()  # as `pretrain` does
    seconds = []
    with TemporaryDirectory() as folder:
        run = Pretraining(loaded, accelerator, Path(folder))
        trainer = run.trainer(progress=False)
        batches = run.batches(0, accelerator.process_index, accelerator.num_processes)
        bar = {"desc": config, "unit": "step", "disable": not accelerator.is_main_process}
        for _ in tqdm(range(steps + 1), **bar):
            samples = next(batches)
            start = time.perf_counter()
            try:
                trainer.train_step(samples)
            except torch.OutOfMemoryError as error:
                raise UsageError(
                    f"A batch of {batch} does not fit into the memory of {device}: give a smaller "
                    "--batch, or --set checkpoint_activations=true."
                ) from error
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    step = spread("seconds", seconds[1:])
    assert step.value is not None and step.low is not None and step.high is not None
    slow, fast, usual = (
        projected_hours(each, batch, loaded.steps) for each in (step.high, step.low, step.value)
    )
    days = [hours / PAPER_DEVICES / 24 for hours in (usual, fast, slow)]
    return [
        Figure("parameters", parameters(run.published) / 1e6, "M"),
        memory.figure(),
        step,
        Figure("steps a second", 1 / step.value, n=step.n),
        Figure("device hours", usual, "h", fast, slow),
        Figure("days", *days[:1], "d", *days[1:]),
    ]


def measure(run: Run, batch: int) -> list[Figure]:
    """Measure one network."""
    backbone = str(run.arm["backbone"])
    overrides = settings(run.lab, backbone, batch)
    steps = run.steps(run.lab.plan.steps or 1)
    return alone(time_steps, backbone, overrides, steps, run.cpu)


def main() -> None:
    """Measure both networks and draw the memory."""
    lab = Lab.parse(__doc__, PLANS, add_arguments, reads_data=False)
    options = lab.plan.options
    batch = options["batch"] if lab.given.batch is None else lab.given.batch
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    axes = {"backbone": options["backbones"], "batch": [batch], "processes": [processes]}
    for arm in lab.arms(axes):
        note = f"{PAPER_BATCH} patches a process in the paper; {batch} here"
        lab.measure(arm, partial(measure, batch=batch), seeds=[None], note=note)
    if not MAIN_PROCESS:
        return
    days = {
        str(arm["backbone"]): {"days": by_seed(lab.records(), "days", arm)}
        for arm in lab.arms(axes)
    }
    title = f"The paper's schedule on {PAPER_DEVICES} such devices"
    lab.finish([bars(lab.output / "days.png", days, "days (projected)", title, None)])


if __name__ == "__main__":
    run_script(main)
