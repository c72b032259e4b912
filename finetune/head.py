"""head: the network stays as it is, and new classes get something small of their own.

    python finetune/head.py DATA "vertebra L1" "vertebra L2" -o runs/lumbar [--test DIR]

Each run adds one branch: a small decoder over the encoder's features, beside the network's own, and
a text-driven head that starts as a copy of the model's. Nothing else is trained. The old classes
therefore stay the same, bit for bit, and the network has to see each window only once: its features
are kept, and a step computes the branch alone.

DATA: see `universal-ct add-class --help`, which does the same. Started again with the same output,
it goes on where it stopped. Use the result: `universal-ct segment CT -m runs/lumbar -o out`.

To change a setting, give its option. To change what is trained, from which batches, or how it is
saved, derive a class from `Head` and override `rates`, `feed` or `save`.

Hardware: two CPU cores are enough. Time and score: see benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from foundation import NewClass, from_pretrained
from foundation.tuning import AFTER, BEFORE, Head, TuningRun, method_settings

SMOKE = {"steps": 2, "validate_every": 2, "windows": 4, "voxels": 4096}


def main(given: Sequence[str] | None = None) -> None:
    """Model, scans, training, scores, files."""
    with method_settings(Head, __doc__, given, smoke=SMOKE) as (options, method):
        # 1. The model as it is, and labelled scans: some to learn from, some to choose the best
        # step by. A class may also have its own prompt, parent or label names: see `NewClass`.
        base = from_pretrained(options.model)
        classes = [NewClass(name) for name in options.classes]
        run = TuningRun(base, method, options.output, options.seed, options.device)
        run.read(options.data, classes, test=options.test, validation=options.validation)

        # 2. What the model makes of the prompts alone; then the branch learns.
        before = run.measure(BEFORE)
        run.train()

        # 3. What it learnt, on the same scans; the model and the report are written.
        tuned = run.finish(before, run.measure(AFTER))
        options.show(tuned)


if __name__ == "__main__":
    main()
