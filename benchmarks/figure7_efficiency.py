"""Figure 7: what one universal model costs, and one network for each of six tasks.

    python benchmarks/figure7_efficiency.py --smoke
    python benchmarks/figure7_efficiency.py --mini
    python benchmarks/figure7_efficiency.py -o OUT    # the real size: no data, a GPU if any
    … --scan-mm 350 350 450 --overlap 0.5 --only backbone=swin_unetr

Protocol
- Data: none. Weights and images are random, as a cost does not depend on them.
- Networks: all our backbones in their published widths. The universal model has the text-driven
  head and the 32 classes. A network of one task has a 1×1×1 convolution and the task's classes. The
  tasks are the six of Table 2: liver, lung, pancreas, hepatic vessel, spleen, colon.
- Operations: torch's counter on one window of 96×96×96 voxels, without gradients. It counts a
  multiply-add as two operations, and neither normalisations nor activations.
- Scan: --scan-mm at 1.5 mm, in windows that overlap by --overlap. Windows × what a window costs.
- Time: of a window, float32, batch 1; median of the repeats, fastest and slowest beside it.
- Memory: the peak in a fresh process, beyond what was in use before. The six networks are loaded
  one after another, so that the largest of them counts.
- Networks with as many classes cost the same, so one of one class and one of two are measured.
- Paper (D, read off its plot): Universal 331 G, DoDNet 1153 G, Swin UNETR 1986 G, nnU-Net 6470 G
  for the six tasks. Its caption (E) says 19 times fewer than nnU-Net, 6 times than Swin UNETR.

Hardware. Any; minutes. Mini: the real sizes on two CPU cores, with fewer repeats.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from math import ceil

import torch
from costs import (
    Memory,
    alone,
    device_of,
    flops,
    parameters,
    seconds_of,
    spread,
    universal_model,
    windows,
)
from lab import Lab, run_script
from plots import bars, by_seed
from runs import Run
from sizes import Plan
from tasks import TASKS
from torch import nn

from foundation import (
    BACKBONES,
    CLASSES,
    ClassSpec,
    NetworkConfig,
    PlainModel,
    Preprocessing,
    UsageError,
)
from foundation.evaluation import Figure

ONE, SIX = "one universal model", "one network a task"
SPACING_MM = 1.5
PLANS = {
    "smoke": Plan(options={"backbones": ["segresnet"], "window": 32, "repeats": 1}),
    "mini": Plan(options={"backbones": sorted(BACKBONES), "window": 96, "repeats": 2}),
    "real": Plan(options={"backbones": sorted(BACKBONES), "window": 96, "repeats": 10}),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the scan."""
    extent = {"nargs": 3, "type": float, "metavar": ("X", "Y", "Z")}
    parser.add_argument("--scan-mm", default=[350, 350, 450], help="extent of a scan", **extent)
    parser.add_argument("--overlap", type=float, default=0.5, help="of windows, in [0, 1)")


def networks(kind: str, backbone: str, window: int) -> list[tuple[int, nn.Module]]:
    """Build the networks of an arm: how many are as costly as this one, and this one.

    Args:
        kind: `ONE` or `SIX`.
        backbone: A name of `BACKBONES`.
        window: Voxels along each axis.
    """
    patch = (window,) * 3
    if kind == ONE:
        return [(1, universal_model(backbone, [c.name for c in CLASSES], patch))]
    found: list[tuple[int, nn.Module]] = []
    for count in sorted({len(task.classes) for task in TASKS}):
        same = [task.classes for task in TASKS if len(task.classes) == count]
        config = NetworkConfig(
            name=backbone,
            backbone=backbone,
            classes=tuple(ClassSpec(name) for name in same[0]),
            preprocessing=Preprocessing(patch_size=patch),
        )
        found.append((len(same), PlainModel(config)))
    return found


def measure_networks(
    kind: str, backbone: str, window: int, repeats: int, cpu: bool
) -> list[Figure]:
    """Measure a forward pass of a window by each network of an arm; run in a fresh process.

    Args:
        kind, backbone, window: As of `networks`.
        repeats: Of the measurement of time.
        cpu: Leave GPUs alone.
    """
    device = device_of(cpu)
    memory = Memory(device)
    image = torch.rand(1, 1, *(window,) * 3, device=device)
    count, total, seconds = 0, 0, [0.0] * repeats
    for times, network in networks(kind, backbone, window):
        network.to(device).eval()
        with torch.inference_mode():
            taken = seconds_of(partial(network, image), repeats, device)
        seconds = [before + times * now for before, now in zip(seconds, taken, strict=True)]
        count += times * parameters(network)
        most = memory.figure()
        total += times * flops(network, image.shape[2:])
    return [
        Figure("parameters", count / 1e6, "M"),
        Figure("flops", total / 1e9, "G"),
        Figure("multiply_adds", total / 2e9, "G"),
        spread("seconds", seconds),
        most,
    ]


def measure(run: Run, shape: Sequence[int], overlap: float) -> list[Figure]:
    """Measure an arm, and multiply by the windows of a scan."""
    options = run.lab.plan.options
    kind, backbone = str(run.arm["networks"]), str(run.arm["backbone"])
    window = options["window"]
    found = alone(measure_networks, kind, backbone, window, options["repeats"], run.cpu)
    count = windows(shape, (window,) * 3, overlap)
    by_name = {figure.name: figure for figure in found}
    seconds = by_name["seconds"]
    scan = [end and end * count for end in (seconds.value, seconds.low, seconds.high)]
    return [
        *found,
        Figure("windows", count),
        Figure("scan/flops", (by_name["flops"].value or 0) * count / 1e3, "T"),
        Figure("scan/seconds", scan[0], "s", scan[1], scan[2], n=seconds.n),
    ]


def main() -> None:
    """Measure all backbones, print how many times fewer operations one model needs, draw."""
    lab = Lab.parse(__doc__, PLANS, add_arguments, reads_data=False)
    if not 0 <= lab.given.overlap < 1:
        raise UsageError(f"--overlap is {lab.given.overlap}; give a share in [0, 1).")
    shape = [ceil(extent / SPACING_MM) for extent in lab.given.scan_mm]
    backbones = lab.plan.options["backbones"]
    run_one = partial(measure, shape=shape, overlap=lab.given.overlap)
    note = f"scan of {' × '.join(map(str, shape))} voxels, overlap {lab.given.overlap}"
    for arm in lab.arms({"backbone": backbones, "networks": [ONE, SIX]}):
        lab.measure(arm, run_one, seeds=[None], note=note)
    groups = {}
    for backbone in backbones:
        counts = {
            kind: by_seed(lab.records(), "flops", {"backbone": backbone, "networks": kind})
            for kind in (ONE, SIX)
        }
        if all(counts.values()):
            groups[backbone] = counts
            factor = counts[SIX][0] / counts[ONE][0]
            print(f"{backbone}: six networks need {factor:.2f} times the operations of one model")
    title = f"A window of {lab.plan.options['window']}³ voxels, six tasks"
    picture = bars(lab.output / "flops.png", groups, "G floating-point operations", title, None)
    lab.finish([picture])


if __name__ == "__main__":
    run_script(main)
