"""Calibrate the Dice that a segmentation is expected to have, and measure how good the guess is.

    python benchmarks/trust.py -o OUT [-m MODEL] [--count 200] [--first-seed 5000]
        [--check CT LABELS] [--into FOLDER] [--record FILE]

Each body is a generated phantom, rendered in a random phase of contrast, whole or as a part of some
20 to 40 cm. The network segments it; the truth is known. For each structure that was found this
gives the network's own estimate of its Dice (`foundation.imaging.assessment`) and its Dice. From
these pairs come one slope, a level for each class, and intervals
(`foundation.imaging.expected_dice`). How good the guess is, is measured by two halves: each half of
the bodies is judged by what the other half gives. --check adds a CT of a person with its labels,
which is only looked at.

Phantoms are drawn anew in each training, so that no body of a seed given here was trained on; but
weights that were trained on phantoms know their kind. OUT receives a line for each structure, and
the script goes on where it stopped. --into writes the calibration into a saved model's folder.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lab import run_script
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from foundation import (
    CLASSES,
    Segmentation,
    VolumeWarning,
    from_pretrained,
    read_ct,
    replacing,
    save_calibration,
)
from foundation.evaluation import (
    Figure,
    add_record_option,
    append_record,
    compare_with_reference,
    dice,
    new_record,
    reference_of,
)
from foundation.imaging import Calibration, calibrate
from foundation.synthesis import Phantom, generate, render_ct, sets_of

SPACING_MM = (2.0, 4.0)
PART_MM = (200, 400)  # of the length of a body, where a part of it is looked at
LEAST_ROWS = 20  # of a class, for a correlation within it
LEAST_ML = 0.1  # a structure of which less is shown says nothing about a mask
Row = dict[str, Any]


def rendered(seed: int) -> tuple[np.ndarray, np.ndarray, Any, slice]:
    """Render a body.

    Args:
        seed: Of the body, its contrast, its spacing and the part that is shown.

    Returns:
        HU (X, Y, Z), affine, the phantom, and the slices that are shown.
    """
    rng = np.random.default_rng(seed)
    spacing_mm = float(rng.uniform(*SPACING_MM))
    body = generate(seed, spacing_mm)
    hu = np.rint(render_ct(body.label_map, body.names, spacing_mm, rng)).astype(np.int16)
    shown = slice(None)
    if seed % 2:
        size = min(hu.shape[2], round(rng.uniform(*PART_MM) / spacing_mm))
        start = int(rng.integers(0, hu.shape[2] - size + 1))
        shown = slice(start, start + size)
    return hu[:, :, shown], body.affine, body, shown


def pairs(result: Segmentation, scores: dict[str, float], scan: str) -> Iterator[Row]:
    """Yield own estimate and Dice of each structure that was found."""
    for name, trust in result.trust.items():
        if trust.own_dice is not None and name in scores:
            yield {"scan": scan, "class": name, "own": trust.own_dice, "dice": scores[name]}


def truth_of(body: Phantom, name: str) -> np.ndarray:
    """Return where a class is in a phantom; an organ holds its lesions."""
    values = [value for value, classes in sets_of(body.names).items() if name in classes]
    mask = np.isin(body.label_map, values)
    right = (body.affine[0, 3] + body.affine[0, 0] * np.arange(len(mask)) > 0)[:, None, None]
    for lesion in (each for each in CLASSES if each.parent is not None):
        if lesion.parent == name:
            mask |= body.mask(lesion.name)
        elif name in (f"{lesion.parent}_right", f"{lesion.parent}_left"):
            mask |= body.mask(lesion.name) & (right == name.endswith("_right"))
    return mask


def measure(model: Any, seed: int) -> list[Row]:
    """Segment a rendered body and hold it against the truth."""
    hu, affine, body, shown = rendered(seed)
    ct = read_ct((hu, affine))
    result = model.segment(ct, progress=False)
    found = {}
    for name in result.present:
        truth = truth_of(body, name)[:, :, shown]
        if truth.sum() * ct.voxel_ml >= LEAST_ML or not truth.any():
            found[name] = dice(result.mask(name), truth) or 0.0  # a mask of what is not there
    return list(pairs(result, found, f"phantom {seed}"))


def halves(rows: list[Row]) -> list[Row]:
    """Judge each half of the scans by what the other gives; adds `expected`, `low`, `high`."""
    scans = sorted({row["scan"] for row in rows})
    judged = []
    for part in (0, 1):
        mine, others = set(scans[part::2]), set(scans[1 - part :: 2])
        found = calibrate(*columns([r for r in rows if r["scan"] in others]), **NOTHING)
        for row in (r for r in rows if r["scan"] in mine):
            judged += judge(row, found)
    return judged


def judge(row: Row, found: Calibration) -> Iterator[Row]:
    """Yield a row with what a calibration expects of it; nothing for a class that it lacks."""
    expected = found.expected(row["class"], row["own"])
    if expected is not None:
        yield {**row, **dict(zip(("expected", "low", "high"), expected, strict=True))}


NOTHING = {"weights_sha256": "", "scans": 0, "source": ""}


def columns(rows: list[Row]) -> tuple[list[str], list[float], list[float]]:
    """Classes, own estimates and Dice of rows."""
    return [r["class"] for r in rows], [r["own"] for r in rows], [r["dice"] for r in rows]


def figures_of(judged: list[Row], kind: str) -> Iterator[Figure]:
    """Yield how good the guess is: rank correlation, absolute error, share within the interval."""
    expected, dice = (np.array([r[key] for r in judged]) for key in ("expected", "dice"))
    inside = [r["low"] <= r["dice"] <= r["high"] for r in judged]
    yield Figure(f"rank correlation/{kind}", float(spearmanr(expected, dice)[0]), n=len(judged))
    yield Figure(f"absolute error/{kind}", float(np.abs(expected - dice).mean()), n=len(judged))
    yield Figure(f"within the interval/{kind}", 100 * float(np.mean(inside)), "%", n=len(judged))
    within = []
    for name in sorted({r["class"] for r in judged}):
        own = [(r["expected"], r["dice"]) for r in judged if r["class"] == name]
        if len(own) >= LEAST_ROWS and len({d for _, d in own}) > 1:
            within.append(float(spearmanr(*zip(*own, strict=True))[0]))
    if within:
        yield Figure(
            f"rank correlation within a class/{kind}", float(np.mean(within)), n=len(within)
        )


def main() -> None:
    """Measure, calibrate, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", default="universal-ct")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="bodies")
    parser.add_argument("--first-seed", type=int, default=5000)
    parser.add_argument("--check", nargs=2, action="append", default=[], metavar=("CT", "LABELS"))
    parser.add_argument("--into", type=Path, help="folder of these weights, which gets trust.json")
    add_record_option(parser)
    given = parser.parse_args()
    began = time.perf_counter()
    warnings.simplefilter("ignore", VolumeWarning)
    model = from_pretrained(given.model)
    sha256 = str(model.weights_sha256)
    given.output.mkdir(parents=True, exist_ok=True)
    for seed in tqdm(range(given.first_seed, given.first_seed + given.count), unit="body"):
        path = given.output / f"{sha256[:12]}-{seed}.json"
        if not path.is_file():
            rows = measure(model, seed)
            with replacing(path) as temporary:  # processes may share OUT, each with its own seeds
                temporary.write_text(json.dumps(rows), encoding="utf-8")
    rows = [
        r
        for p in sorted(given.output.glob(f"{sha256[:12]}-*.json"))
        for r in json.loads(p.read_text())
    ]
    source = "renderings of generated phantoms"
    scans = len({row["scan"] for row in rows})
    found = calibrate(*columns(rows), weights_sha256=sha256, scans=scans, source=source)
    figures = list(figures_of(halves(rows), "phantoms"))
    checked: list[Row] = []
    for ct, labels in given.check:
        result = model.segment(ct, progress=False)
        scores = {
            each.name.removeprefix("dice/"): each.value
            for each in compare_with_reference(result, reference_of(Path(labels), like=result))
            if each.name.startswith("dice/") and each.value is not None
        }
        for row in pairs(result, scores, ct):
            checked += judge(row, found)
    if checked:
        figures += figures_of(checked, "people")
    print(json.dumps({each.name: round(each.value or 0.0, 3) for each in figures}, indent=2))
    if given.into:
        print(save_calibration(given.into, found))
    if given.record:
        record = new_record(
            "trust",
            "real",
            arm={"bodies": scans},
            figures=figures,
            seconds=time.perf_counter() - began,
            weights={model.config.name: sha256},
            seed=given.first_seed,
            note=f"{source.capitalize()}, which are no patients.",
        )
        append_record(given.record, record)


if __name__ == "__main__":
    run_script(main)
