"""From label maps to a tuned model and its report, on open data: the whole of fine-tuning.

    python finetune/walkthrough.py DATA -o runs/walkthrough [--methods head lora …] [--scans 5]

DATA holds the open CTs and label maps of `foundation/datasets/open-data.yaml`. Training scans are
synthetic: two people's label maps, rendered. The test scan is real: TotalSegmentator's example CT,
with machine labels, so that scores are agreement. The released weights have seen that CT with the
labels of their own classes, but none of the classes that are added here.

One folder a method: model or adapter, report.html, report.csv; and careless/, which is `full`
without any protection of the old classes, to see what forgetting looks like.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from foundation import NewClass, finetune
from foundation.tuning.methods import METHODS

MAPS = ("totalsegmentator_s0327", "totalsegmentator_s0328")
TEST = "totalsegmentator_example"
CLASSES = (
    NewClass("vertebra L1", labels=("vertebrae_L1",)),
    NewClass("vertebra L2", labels=("vertebrae_L2",)),
    NewClass("vertebra L3", labels=("vertebrae_L3",)),
    NewClass("left hip", labels=("hip_left",)),
    NewClass("right hip", labels=("hip_right",)),
    NewClass("left iliopsoas", labels=("iliopsoas_left",)),
    NewClass("right iliopsoas", labels=("iliopsoas_right",)),
)
OLD = ("liver", "spleen", "kidney_left", "kidney_right", "aorta", "urinary_bladder", "colon")


def main() -> None:
    """Render training scans, tune by each method, and print what each reached."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/walkthrough"))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "careless"], default=["head"])
    parser.add_argument("--scans", type=int, default=5, help="synthetic training scans")
    parser.add_argument("--steps", type=int, help="of each method; its own if not given")
    given = parser.parse_args()

    # 1. Training scans, rendered from label maps with all the labels that are compared below.
    scans = given.output / "scans"
    labels = [label for each in CLASSES for label in each.labels]
    script = Path(__file__).with_name("synthesise.py")
    command = [sys.executable, str(script), str(given.data), str(scans), "-n", str(given.scans)]
    subprocess.run([*command, "--cases", *MAPS, "--keep", *labels, *OLD], check=True)

    # 2. Each method from the same weights, on the same scans, measured on the same real CT.
    test = given.output / "test"
    test.mkdir(parents=True, exist_ok=True)
    if not (test / TEST).exists():
        (test / TEST).symlink_to((given.data / TEST).resolve(), target_is_directory=True)
    for method in given.methods:
        careless = method == "careless"
        tuned = finetune(
            "universal-ct",
            scans,
            [replace(each) for each in CLASSES],
            output=given.output / method,
            method="full" if careless else method,
            protect="nothing" if careless else None,
            test=test,
            steps=given.steps,
        )
        # 3. What it learnt, and what it forgot.
        print(f"\n{method}\n{tuned.table()}\nreport: {tuned.report}", file=sys.stderr)
        (given.output / f"{method}.json").write_text(json.dumps(tuned.summary(), indent=2))


if __name__ == "__main__":
    main()
