"""Training throughput with the real loader, against the same step on tensors already in memory.

    python benchmarks/throughput.py CONFIG [--store DIR] [--steps N] [--record FILE]
        [KEY=VALUE ...]

Both run the trainer's own step, on the same device and in alternating rounds; the second is fed the
same few batches again and again. Prints samples per second of both, and what share of the compute
step's throughput the training has. The target is 95 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from foundation import keep_freed_memory
from foundation.evaluation import (
    Figure,
    add_record_option,
    append_record,
    new_record,
    path_sha256,
)
from foundation.pretraining import Pretraining, load_config, with_store
from foundation.training import Trainer, accelerator_for

Batch = dict[str, Tensor]


def seconds_of(trainer: Trainer, batches: Iterator[list[Batch]], steps: int) -> float:
    """Measure the wall time of `steps` optimiser steps."""
    _wait()
    start = time.perf_counter()
    for _ in range(steps):
        trainer.train_step(next(batches))
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a YAML file, or the name of a shipped configuration")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--store", help="prepared scans")
    parser.add_argument("--steps", type=int, default=20, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=5, help="steps before the first round")
    parser.add_argument("--cpu", action="store_true")
    add_record_option(parser)
    given = parser.parse_intermixed_args()
    began = time.perf_counter()

    longest = given.warm_up + 2 * given.steps * given.rounds + 1
    # Speed does not depend on the weights, and those that a second pass starts from may not exist.
    overrides = [*given.overrides, "initialise_from=null"]
    config = load_config(given.config, overrides)
    last = len(config.stages) - 1
    # The last stage alone, long enough for all rounds and for what workers fetch ahead.
    raw = [*overrides, f"stages.{last}.steps={10 * longest}"]
    config = with_store(load_config(given.config, raw), given.store)
    first_step = sum(stage.steps for stage in config.stages[:-1])
    stage = config.stages[-1]
    with tempfile.TemporaryDirectory() as folder:
        device = "cpu" if given.cpu else None
        run = Pretraining(config, accelerator_for(config.precision, device), Path(folder))
        if run.accelerator.device.type == "cpu":
            keep_freed_memory()  # as `pretrain` does
        trainer = run.trainer(progress=False)
        trainer.step = first_step
        loader = run.batches(first_step, rank=0, processes=1)
        kept = list(itertools.islice(loader, 2))
        seconds_of(trainer, loader, given.warm_up)
        rates: dict[str, list[float]] = {"training": [], "compute": []}
        samples = given.steps * stage.batch_size * stage.accumulation
        for _ in range(given.rounds):
            for name, source in (("training", loader), ("compute", itertools.cycle(kept))):
                rates[name].append(samples / seconds_of(trainer, source, given.steps))
                # What was fetched ahead while the other was measured is used up, not measured.
                if name == "compute":
                    seconds_of(trainer, loader, _ahead(config.workers))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    report = {
        "config": given.config,
        "patch_size": stage.patch_size,
        "batch_size": stage.batch_size,
        "workers": config.workers,
        "samples_per_second": {name: round(value, 3) for name, value in medians.items()},
        "percent_of_compute": round(100 * medians["training"] / medians["compute"], 1),
        "threads": torch.get_num_threads(),
        "device": str(run.accelerator.device),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=2))
    if given.record:
        kinds = ", ".join(dict.fromkeys(source.kind for source in config.sources))
        record = new_record(
            "throughput",
            "real",
            arm={"what": f"{kinds}, `echo: {config.echo}`, {config.precision}"},
            figures=[
                Figure("training", medians["training"], "samples/s", n=given.rounds),
                Figure("bare_step", medians["compute"], "samples/s", n=given.rounds),
                Figure("share", medians["training"] / medians["compute"]),
            ],
            seconds=time.perf_counter() - began,
            # The manifest has the SHA-256 of every file that the scans were made of.
            data={"manifest.json": path_sha256(Path(given.store) / "manifest.json")}
            if given.store
            else {},
        )
        append_record(given.record, record)


def _ahead(workers: int) -> int:
    """Batches that workers have ready at most: see `prefetch_factor` in the mixture."""
    return 4 * workers


if __name__ == "__main__":
    main()
