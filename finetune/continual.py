"""continual: everything is trained; the old model labels the old classes in the new scans.

    python finetune/continual.py DATA "vertebra L1" "vertebra L2" -o runs/lumbar [--test DIR]

The old model segments the training scans once. Its masks, cleaned up, are labels of the old classes
where the scans have none, so that every class is trained on every scan. The new classes have a
small decoder, and each a head that its prompt generates and a classifier; they learn alone first,
as by head.py. Then everything learns, backbone and old head at 0.015 of the rate.
Reference: Zhang et al., MICCAI 2023 (arXiv 2306.00988). Deviation: the old classes keep their
common head.

A class that the model has is tuned further: `python finetune/continual.py DATA liver -o OUT`.

DATA: see `universal-ct add-class --help`, which does the same. Started again with the same output,
it goes on where it stopped. Use the result: `universal-ct segment CT -m runs/lumbar -o out`.

To change a setting, give its option. To change what is trained, from which batches, or how it is
saved, derive a class from `Continual` and override `rates`, `feed` or `save`.

Hardware: one GPU, or several by torchrun; on two CPU cores a step takes seconds. Time and score:
see benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from foundation import NewClass, from_pretrained
from foundation.tuning import AFTER, BEFORE, Continual, TuningRun, method_settings

SMOKE = {"steps": 2, "probe": 2, "validate_every": 2, "windows": 4, "voxels": 4096}


def main(given: Sequence[str] | None = None) -> None:
    """Model, scans, training, scores, files."""
    with method_settings(Continual, __doc__, given, smoke=SMOKE) as (options, method):
        # 1. The model as it is, and labelled scans: some to learn from, some to choose the best
        # step by. A class may also have its own prompt, parent or label names: see `NewClass`.
        base = from_pretrained(options.model)
        classes = [NewClass(name) for name in options.classes]
        run = TuningRun(base, method, options.output, options.seed, options.device)
        run.read(options.data, classes, test=options.test, validation=options.validation)

        # 2. Before; then the new parts alone, as by head.py; then everything, on masks too.
        before = run.measure(BEFORE)
        run.train()

        # 3. What it learnt and what it forgot, on the same scans; model and report are written.
        tuned = run.finish(before, run.measure(AFTER))
        options.show(tuned)


if __name__ == "__main__":
    main()
