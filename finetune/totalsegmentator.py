"""TotalSegmentator's five tasks, from any pretrained or untrained backbone: what transfer is worth.

    python finetune/totalsegmentator.py DATA --task organs --start universal-ct-unet -o runs/organs
    python finetune/totalsegmentator.py DATA --task organs --start scratch --backbone unet -o …
    … --version 2 --head softmax|sigmoid|text --shots 20 --seed 1

DATA is the dataset as it is published, of version 1 (zenodo 6802613) or 2 (zenodo 10047292): a
folder per scan (ct.nii.gz, segmentations/*.nii.gz) and meta.csv, whose splits are kept: training,
the best step, the test. Tasks: organs 17 classes, vertebrae 24, cardiac 18 (12 in version 2),
muscles 21, ribs 24. Started again, it goes on where it stopped.

--start: a name, folder or file of weights, or `scratch` with --backbone NAME: of a backbone
(lite_unet, unet, swin_unetr …), or of weights, whose architecture and preprocessing are then taken
without what they learnt. Compare `--start universal-ct` with `--start scratch --backbone
universal-ct`: nothing else differs.

--head: `softmax` is the published protocol, which drops the text-driven head: background and
classes by a plain 1×1×1 convolution, Dice and cross-entropy. `sigmoid`: one for each class, with
masked losses. `text`: the text-driven head is kept and told the classes by their prompts.

--shots: scans to learn from, nested and seeded: the 5 are among the 10, and all sizes are written
to OUT/data/subsets.json. A few scans do not show every class. Those count all the same, in the mean
too.

Preprocessing: the published protocol's (1.5 mm, HU -250 to 250, 96³) for backbones that read one
window at 1.5 mm. Other weights keep their own, since they know nothing else: `universal-ct` reads
two windows at 3 mm. Scores at 3 mm and at 1.5 mm are not to be compared with each other.

OUT receives model/, report.html, report.csv, before.json, after.json, the prepared data and the
state. Printed: the mean Dice over classes, each over the test scans that show it; background is not
among them. (The published log has it in the mean, which raises it.) Masks are not cleaned up.

Hardware: meant for one GPU; from `universal-ct` and a few scans also a CPU, with `--voxels 32768`.
Time and score: not measured on the dataset. `--smoke`, two steps on generated scans, takes under
half a minute on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

import nibabel as nib
import numpy as np

from foundation import (
    BACKBONES,
    UniversalCTError,
    UniversalModel,
    UsageError,
    base_sha256,
    choose_device,
    evaluate,
    from_pretrained,
    keep_freed_memory,
    listed,
)
from foundation.evaluation import Curve, Report, Scores, write_report
from foundation.tuning import (
    HEADS,
    PUBLISHED,
    TASKS,
    TuningData,
    build_transfer,
    get_task,
    random_model,
    read_task,
    transfer_method,
    transfer_model,
    transfer_preprocessing,
    validation_curve,
)

SCRATCH = "scratch"
SMOKE = {"steps": 2}
SMOKE_SPLITS = ("train", "train", "train", "train", "val", "test")


@dataclass(frozen=True)
class Settings:
    """What to learn, from what, and how long; every field is an option of the command line.

    Attributes:
        shots: Number of training scans; None for all.
        epochs: Passes over the training scans, one crop of each scan in a pass.
        steps: Optimiser steps, instead of `epochs`.
        voxels: Of a patch, that the loss looks at; None for all.
        spacing_mm: Of the grid; None for the weights' own or the published one.
        hu_low: Lower end of the HU window, instead of the start's own.
        hu_high: Upper end of the HU window.
        patch_size: Voxels along each side, instead of the start's own.
        tolerance_mm: Of the surface Dice.
    """

    data: Path
    output: Path
    task: str = "organs"
    version: int = 1
    start: str = "universal-ct"
    backbone: str | None = None
    head: str = "softmax"
    shots: int | None = None
    seed: int = 0
    epochs: int = PUBLISHED.epochs
    steps: int | None = None
    batch_size: int = 1
    learning_rate: float = PUBLISHED.learning_rate
    voxels: int | None = None
    spacing_mm: float | None = None
    hu_low: float | None = None
    hu_high: float | None = None
    patch_size: int | None = None
    tolerance_mm: float = 2.0
    device: str = "auto"
    workers: int = 1

    def __post_init__(self) -> None:
        get_task(self.task).in_version(self.version)
        if self.head not in HEADS:
            raise UsageError(f"Unknown head {self.head!r}. Choose one of {', '.join(HEADS)}.")
        if (self.start == SCRATCH) != (self.backbone is not None):
            raise UsageError(
                "--start scratch and --backbone NAME go together: an untrained backbone, by its "
                f"name ({', '.join(BACKBONES)}) or that of weights. Weights bring their own."
            )
        for name in ("shots", "epochs", "steps", "batch_size", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be 1 or more.")


def main(given: Sequence[str] | None = None) -> None:
    """Read the command line, learn, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", type=Path, nargs="?", help="folder of the dataset, with meta.csv")
    add("-o", "--output", type=Path, help="folder of the run")
    add("--task", help=f"one of {', '.join(TASKS)} ({Settings.task})")
    add("--version", type=int, help=f"of the dataset, 1 or 2 ({Settings.version})")
    add("--start", help=f"weights, or {SCRATCH} ({Settings.start})")
    add("--backbone", help="untrained: a backbone's name, or that of weights")
    add("--head", help=f"one of {', '.join(HEADS)} ({Settings.head})")
    for name in ("shots", "seed", "epochs", "steps", "batch-size", "voxels", "workers"):
        add(f"--{name}", type=int, metavar="N")
    for name in ("learning-rate", "spacing-mm", "hu-low", "hu-high", "tolerance-mm"):
        add(f"--{name}", type=float, metavar="X")
    add("--patch-size", type=int, metavar="N", help="voxels along each axis")
    add("--device", help="auto, cpu, cuda, cuda:1, mps")
    add("--smoke", action="store_true", help="two steps on generated scans")
    options = vars(parser.parse_args(given))
    values = {key: value for key, value in options.items() if value is not None}
    if not values.pop("smoke"):
        if "data" not in values or "output" not in values:
            parser.error("give DATA and -o OUT, or --smoke to try it on generated scans")
        learn(Settings(**values))
        return
    if "data" in values:
        parser.error("--smoke generates its scans: leave DATA out")
    with tempfile.TemporaryDirectory() as folder:
        start = {} if "start" in values else {"start": SCRATCH, "backbone": "lite_unet"}
        place = {"data": Path(folder, "data"), "output": Path(folder, "run")}
        settings = Settings(**{**place, **SMOKE, **start, **values})
        write_tree(settings.data, get_task(settings.task).in_version(settings.version))
        learn(settings, smoke=True)


def learn(settings: Settings, *, smoke: bool = False) -> Scores:
    """Weights, scans, network, training, test, files; returns the test's scores."""
    # 1. Where it starts from, and which scans: on the grid that the network reads.
    classes = get_task(settings.task).in_version(settings.version)
    device = choose_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()  # half of a step's time
    if settings.backbone is None:
        base = from_pretrained(settings.start)
    else:
        base = random_model(settings.backbone, classes, settings.seed)
    pre = transfer_preprocessing(
        base,
        spacing_mm=settings.spacing_mm,
        hu_window=(settings.hu_low, settings.hu_high),
        patch_size=settings.patch_size,
    )
    network = transfer_model(base, classes, settings.head, preprocessing=pre, seed=settings.seed)
    network.config = replace(network.config, name=settings.output.resolve().name)
    data = read_task(
        settings.data,
        classes,
        work=settings.output / "data",
        spacing_mm=pre.spacing_mm[0],
        shots=settings.shots,
        seed=settings.seed,
        workers=settings.workers,
    )

    # 2. All of it is trained; the step that does best on the validation scans is kept.
    steps = settings.steps or settings.epochs * ceil(len(data.train) / settings.batch_size)
    method = transfer_method(
        settings.head,
        pre,
        steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        voxels=settings.voxels,
    )
    tuning = settings.output / "tuning"
    trainer = build_transfer(network, data, method, tuning, seed=settings.seed, device=device)
    masks = settings.output / "masks"
    options = {"tolerance_mm": settings.tolerance_mm, "postprocess": False}
    before = evaluate(network, data.test, classes, **options)
    trainer.train()

    # 3. The test scans, once, and what was learnt on disk.
    after = evaluate(network.eval(), data.test, classes, masks=masks, keep=classes, **options)
    network.save_pretrained(settings.output / "model")
    before.write(settings.output / "before.json")
    after.write(settings.output / "after.json")
    page = write_report(settings.output, report_of(settings, base, data, (before, after)))
    print(summary(classes, before, after))
    if not smoke:
        print(f"report: {page}", file=sys.stderr)
    return after


# --- what is told ---------------------------------------------------------------------------------


def summary(classes: Sequence[str], before: Scores, after: Scores) -> str:
    """The mean Dice over the classes, not background, that any test scan shows."""
    means = [f"{scores.mean(classes) or 0:.3f}" for scores in (before, after)]
    shown = sum(name in after.classes for name in classes)
    return (
        f"foreground mean Dice, {shown} of {len(classes)} classes in {len(after.cases)} test "
        f"scans: {means[0]} before, {means[1]} after"
    )


def report_of(
    settings: Settings, base: UniversalModel, data: TuningData, scores: tuple[Scores, Scores]
) -> Report:
    """What report.html and report.csv are made of."""
    classes = get_task(settings.task).in_version(settings.version)
    unseen = [name for name in classes if not data.counts(name)["train"]]
    untrained = "an untrained head on the backbone, no prompt"
    absent = f"No training scan shows {listed(unseen, 24)}: in the mean they count all the same."
    return Report(
        title=f"TotalSegmentator {settings.version}, {settings.task}: {base.config.name}",
        lineage={
            "start": base.config.name,
            "SHA-256 of its weights, in half precision": base_sha256(base),
            "data": f"{data.layout}, SHA-256 {data.digest}",
            "scans": f"{len(data.train)} to train, {len(data.validation)} to validate, "
            f"{len(data.test)} to test",
            "settings": ", ".join(f"{key} {value}" for key, value in asdict(settings).items()),
        },
        new=classes,
        old=(),
        before=scores[0],
        after=scores[1],
        before_is="by the prompt alone" if settings.head == "text" else untrained,
        training=(Curve("validation Dice", validation_curve(settings.output / "tuning")),),
        cases=data.test,
        masks=settings.output / "masks",
        notes=(
            *data.notes,
            *([absent] if unseen else []),
        ),
    )


# --- generated scans ------------------------------------------------------------------------------


def write_tree(root: Path, labels: Sequence[str], spacing_mm: float = 3.0) -> Path:
    """Six scans as the dataset has them, of cubes in fat: a cube a label, each of its own HU."""
    for number, _ in enumerate(SMOKE_SPLITS):
        rng = np.random.default_rng(number)
        hu = rng.normal(-90, 10, (32, 32, 32))
        hu[-2:] = -1000  # air, as in every CT; a single plane of it would look like noise
        shift = rng.integers(0, 3, 3)
        folder = root / f"s{number:04d}"
        (folder / "segmentations").mkdir(parents=True)
        affine = np.diag([spacing_mm] * 3 + [1.0])
        for place, label in enumerate(labels):
            corner = np.array(np.unravel_index(place, (3, 3, 3))) * 10 + shift
            cube = tuple(slice(int(at), int(at) + 8) for at in corner)
            mask = np.zeros(hu.shape, np.uint8)
            mask[cube] = 1
            hu[cube] = 20 + 15 * place + rng.normal(0, 5, mask[cube].shape)
            path = folder / "segmentations" / f"{label}.nii.gz"
            nib.save(nib.Nifti1Image(mask, affine), path)
        nib.save(nib.Nifti1Image(hu.astype(np.int16), affine), folder / "ct.nii.gz")
    rows = [f"s{number:04d};50;{split}" for number, split in enumerate(SMOKE_SPLITS)]
    (root / "meta.csv").write_text("\n".join(["image_id;age;split", *rows]) + "\n")
    return root


if __name__ == "__main__":
    try:
        main()
    except UniversalCTError as error:
        raise SystemExit(f"totalsegmentator.py: {error}") from None
