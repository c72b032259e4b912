"""full: everything is trained, what was trained before more slowly, the first stages most slowly.

    python finetune/full.py DATA "vertebra L1" "vertebra L2" -o runs/lumbar [--test DIR]

The new classes get a small decoder and a head of their own and learn alone first, as by head.py.
Then everything learns: backbone and old head at 0.025 of the rate, each stage of the backbone at
0.8 of the stage above. Only the old model keeps the old classes: where the scans do not label them,
its probabilities are their target. With `--protect mask` they are left out of the loss, and drift.
Reference: Kumar et al., ICLR 2022 (arXiv 2202.10054).

A class that the model has is tuned further: `python finetune/full.py DATA liver -o runs/liver`.

DATA: see `universal-ct add-class --help`, which does the same. Started again with the same output,
it goes on where it stopped. Use the result: `universal-ct segment CT -m runs/lumbar -o out`.

To change a setting, give its option. To change what is trained, from which batches, or how it is
saved, derive a class from `Full` and override `rates`, `feed` or `save`.

Hardware: one GPU, or several by torchrun; on two CPU cores a step takes seconds. Time and score:
see benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from foundation import NewClass, from_pretrained
from foundation.tuning import AFTER, BEFORE, Full, TuningRun, method_settings

SMOKE = {"steps": 2, "probe": 2, "validate_every": 2, "windows": 4, "voxels": 4096}


def main(given: Sequence[str] | None = None) -> None:
    """Model, scans, training, scores, files."""
    with method_settings(Full, __doc__, given, smoke=SMOKE) as (options, method):
        # 1. The model as it is, and labelled scans: some to learn from, some to choose the best
        # step by. A class may also have its own prompt, parent or label names: see `NewClass`.
        base = from_pretrained(options.model)
        classes = [NewClass(name) for name in options.classes]
        run = TuningRun(base, method, options.output, options.seed, options.device)
        run.read(options.data, classes, test=options.test, validation=options.validation)

        # 2. Before; then the new parts alone, as by head.py; then everything.
        before = run.measure(BEFORE)
        run.train()

        # 3. What it learnt and what it forgot, on the same scans; model and report are written.
        tuned = run.finish(before, run.measure(AFTER))
        options.show(tuned)


if __name__ == "__main__":
    main()
