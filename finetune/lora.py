"""lora: low-rank changes all over the network, and a small decoder and head for the new classes.

    python finetune/lora.py DATA "vertebra L1" "vertebra L2" -o runs/lumbar [--rank 4] [--test DIR]

The new parts learn alone first, as by head.py. Then each convolution and linear layer learns a
change of rank 1 beside it, at a quarter of the rate. All of that, a few hundred kB, is saved apart
from the weights as an adapter: with it off, the model is the old one, bit for bit. While it is on,
the old classes are computed from changed features; where the scans do not label them, the old
model's probabilities are their target. Reference: Hu et al., ICLR 2022 (arXiv 2106.09685).

A class that the model has is tuned further: `python finetune/lora.py DATA liver -o runs/liver`.

DATA: see `universal-ct add-class --help`, which does the same. Started again with the same output,
it goes on where it stopped. Use the result: `universal-ct segment CT -m runs/lumbar -o out`.

To change a setting, give its option. To change what is trained, from which batches, or how it is
saved, derive a class from `Lora` and override `rates`, `feed` or `save`.

Hardware: one GPU, or several by torchrun; on two CPU cores a step takes seconds. Time and score:
see benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from foundation import NewClass, from_pretrained
from foundation.tuning import AFTER, BEFORE, Lora, TuningRun, method_settings

SMOKE = {"steps": 2, "probe": 2, "validate_every": 2, "windows": 4, "voxels": 4096}


def main(given: Sequence[str] | None = None) -> None:
    """Model, scans, training, scores, files."""
    with method_settings(Lora, __doc__, given, smoke=SMOKE) as (options, method):
        # 1. The model as it is, and labelled scans: some to learn from, some to choose the best
        # step by. A class may also have its own prompt, parent or label names: see `NewClass`.
        base = from_pretrained(options.model)
        classes = [NewClass(name) for name in options.classes]
        run = TuningRun(base, method, options.output, options.seed, options.device)
        run.read(options.data, classes, test=options.test, validation=options.validation)

        # 2. Before; then the new parts alone, as by head.py; then they and the adapter.
        before = run.measure(BEFORE)
        run.train()

        # 3. What it learnt and what it forgot, on the same scans; adapter and report are written.
        tuned = run.finish(before, run.measure(AFTER))
        options.show(tuned)


if __name__ == "__main__":
    main()
