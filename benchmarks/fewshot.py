"""Fine-tuning from pretrained weights against the same network from scratch, by number of scans.

    python benchmarks/fewshot.py SCANS --test TEST -o OUT [--shots 1 2 5] [--steps 160]
        [--probe 360] [-m universal-ct] [--classes "vertebra L1" "left hip" …] [--record FILE]

SCANS and TEST hold a folder per case, as `universal-ct add-class` reads them (`finetune/
synthesise.py` makes such scans from label maps). The subsets are nested: each holds the smaller
ones; all of their scans are trained on, and the best step is chosen on them. Both runs have the
network, the steps and the seed in common. The pretrained one takes `--probe` steps on cached
features and STEPS in the whole network, as `full` does; scratch, whose features show nothing to
probe, takes as many in all through the network, at the full rate, with no old classes to keep. So
scratch computes for longer. OUT receives a folder per run, fewshot.csv,
and report.html with the curve. Started again it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

from foundation import Tuned, UniversalModel, finetune, from_pretrained
from foundation.evaluation import (
    Curve,
    Figure,
    Report,
    add_record_option,
    append_record,
    new_record,
    path_sha256,
    weights_sha256,
    write_report,
)
from foundation.tuning import fewshot_subsets, random_model, write_subsets

CLASSES = ("vertebra L1", "vertebra L2", "vertebra L3", "left hip", "right hip")
STARTS = ("pretrained", "scratch")
SCRATCH_RATE = 3e-3  # as the coarse stage of the pretraining has it


def subset(scans: Path, cases: list[str], folder: Path) -> Path:
    """Make a folder with links to some of the cases."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        if not (folder / case).exists():
            (folder / case).symlink_to((scans / case).resolve(), target_is_directory=True)
    return folder


def tune(start: str, model: UniversalModel, scans: Path, args: argparse.Namespace) -> Tuned:
    """Tune once; scratch learns everything at the full rate and has nothing to keep."""
    scratch = start == "scratch"
    own = {"protect": "mask", "learning_rate": SCRATCH_RATE, "backbone_rate": 1.0, "probe": 0}
    options = {**own, "layer_decay": 1.0} if scratch else {"probe": args.probe}
    steps = args.steps + (args.probe if scratch else 0)
    return finetune(
        random_model(args.model, (), args.seed) if scratch else model,
        scans,
        args.classes,
        output=args.output / f"{start}_{scans.name.rpartition('_')[2]}",
        method="full",
        test=args.test,
        seed=args.seed,
        validation=0,
        steps=steps,
        validate_every=steps // 2,
        patience=10**6,  # both take all their steps
        **options,
    )


def main() -> None:
    """Tune each subset from both starts, and write table and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("scans", type=Path)
    add("--test", type=Path, required=True)
    add("-o", "--output", type=Path, required=True)
    add("-m", "--model", default="universal-ct")
    add("--classes", nargs="+", default=list(CLASSES))
    add("--shots", nargs="+", type=int, default=[1, 2, 5])
    add("--steps", type=int, default=160)
    add("--probe", type=int, default=360)
    add("--seed", type=int, default=1)
    add_record_option(parser)
    args = parser.parse_args()

    model = from_pretrained(args.model)
    cases = [path.name for path in args.scans.iterdir() if path.is_dir()]
    subsets = fewshot_subsets(cases, args.shots, args.seed)
    write_subsets(args.output / "subsets.json", subsets, args.seed)
    found: dict[str, dict[int, float]] = {start: {} for start in STARTS}
    for shots, chosen in subsets.items():
        scans = subset(args.scans, chosen, args.output / f"scans_{shots}")
        for start in STARTS:
            began = time.perf_counter()
            tuned = tune(start, model, scans, args)
            found[start][shots] = tuned.after.mean(tuned.new) or 0.0
            print(json.dumps({"start": start, "scans": shots, "dice": found[start][shots]}))
            if args.record:
                steps = f"{args.probe} + {args.steps}"
                pretrained = start == "pretrained"
                record = new_record(
                    "fewshot",
                    "real",
                    arm={
                        "scans": shots,
                        "start": "weights" if pretrained else "scratch",
                        "steps": steps if pretrained else str(args.probe + args.steps),
                    },
                    seed=args.seed,
                    figures=[Figure("dice/new", found[start][shots], n=len(tuned.after.cases))],
                    seconds=time.perf_counter() - began,
                    data={"scans": path_sha256(scans), "test": path_sha256(args.test)},
                    weights=weights_sha256(model) if pretrained else {},
                )
                append_record(args.record, record)
            if start == "pretrained":
                last = tuned
    with (args.output / "fewshot.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["scans", *STARTS])
        table.writerows([n, *(f"{found[s][n]:.4f}" for s in STARTS)] for n in subsets)
    curves = tuple(
        Curve(f"{start} weights", tuple((float(n), dice) for n, dice in found[start].items()))
        for start in STARTS
    )
    report = Report(
        title="Pretrained against scratch, by number of training scans",
        lineage={
            "model": args.model,
            "steps": f"{args.probe} + {args.steps}",
            "seed": str(args.seed),
        },
        new=last.new,
        old=last.old,
        before=last.before,
        after=last.after,
        fewshot=curves,
        notes=(f"The tables show the pretrained weights tuned on {max(subsets)} scans.",),
    )
    print(write_report(args.output, report))


if __name__ == "__main__":
    main()
