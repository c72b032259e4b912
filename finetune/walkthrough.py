"""From label maps to a tuned model and its report, on open data: the whole of fine-tuning.

    python finetune/walkthrough.py DATA -o runs/walkthrough [--methods head lora …] [--scans 5]

DATA holds the open CTs and label maps of `foundation/data/open-data.yaml`. Training scans are
synthetic: two people's label maps, rendered. The test scan is real: TotalSegmentator's example CT,
with machine labels, so that scores are agreement. The released weights have seen that CT with the
labels of their own classes, but none of the classes that are added here.

One folder a method: model or adapter, report.html, report.csv; and careless/, which is `full`
without any protection of the old classes, to see what forgetting looks like. comparison.html and
comparison.csv show all that have been run side by side. `--smoke` takes two steps of `head` on
generated scans instead, to see that everything works.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foundation import NewClass, finetune
from foundation.evaluation import write_comparison
from foundation.synthesis import SMOKE_CLASS, write_scans
from foundation.tuning import METHODS

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


def main(given: Sequence[str] | None = None) -> None:
    """Render training scans, tune by each method, and print what each reached."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/walkthrough"))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "careless"], default=["head"])
    parser.add_argument("--scans", type=int, default=5, help="synthetic training scans")
    parser.add_argument("-m", "--model", default="universal-ct", help="to start from")
    parser.add_argument("--steps", type=int, help="of each method; its own if not given")
    parser.add_argument("--smoke", action="store_true", help="two steps on generated scans")
    args = parser.parse_args(given)
    if args.smoke:
        smoke()
        return
    if args.data is None:
        parser.error("give DATA, or --smoke to try it on generated scans")
    scans, test = prepare(args.data, args.output, args.scans)
    for method in args.methods:
        tune(method, args.model, scans, test, args.output, CLASSES, steps=args.steps)
        print(f"report: {args.output / method / 'report.html'}", file=sys.stderr)
    print(f"side by side: {args.output / 'comparison.html'}", file=sys.stderr)


def prepare(data: Path, output: Path, count: int) -> tuple[Path, Path]:
    """Folders of training and test scans.

    The training scans are rendered from label maps, with all the labels that are compared later.
    """
    scans, test = output / "scans", output / "test"
    labels = [label for each in CLASSES for label in each.labels]
    script = Path(__file__).with_name("synthesise.py")
    command = [sys.executable, str(script), str(data), str(scans), "-n", str(count)]
    subprocess.run([*command, "--cases", *MAPS, "--keep", *labels, *OLD], check=True)
    test.mkdir(parents=True, exist_ok=True)
    if not (test / TEST).exists():
        (test / TEST).symlink_to((data / TEST).resolve(), target_is_directory=True)
    return scans, test


def tune(
    method: str,
    model: str,
    scans: Path,
    test: Path,
    output: Path,
    classes: Sequence[NewClass],
    **settings: Any,
) -> None:
    """Tune by one method, from the same weights on the same scans as by any other one.

    Prints what it learnt and what it forgot, writes it to METHOD.json, and compares all of these.
    """
    careless = method == "careless"
    tuned = finetune(
        model,
        scans,
        classes,
        output=output / method,
        method="full" if careless else method,
        test=test,
        **({"protect": "nothing"} if careless else {}),
        **settings,
    )
    print(f"\n{method}\n{tuned.table()}", file=sys.stderr)
    (output / f"{method}.json").write_text(json.dumps(tuned.summary(), indent=2))
    runs = {name: output / f"{name}.json" for name in (*METHODS, "careless")}
    summaries = {name: json.loads(path.read_text()) for name, path in runs.items() if path.exists()}
    write_comparison(output, summaries, [f"Model before: {model}. Measured on {TEST}."])


def smoke() -> None:
    """Two steps on generated scans, with a generated one to test on; nothing is kept."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        scans, test = write_scans(root / "scans", 2), write_scans(root / "test", 1, first_seed=2)
        few = {"steps": 2, "validate_every": 2, "windows": 4, "voxels": 4096}
        tune("head", "universal-ct", scans, test, root, [NewClass(SMOKE_CLASS)], **few)


if __name__ == "__main__":
    main()
