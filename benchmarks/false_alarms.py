"""How often a normal CT is doubted, and how often a faulty one is not, over renderings of phantoms.

    python benchmarks/false_alarms.py [--count 500] [--first-seed 1000] [--spacing 4 8]
        [--record FILE]

Each body is a generated phantom at a random spacing, rendered in a random phase of contrast. It is
looked at whole and as one of these: a slab, a part from the middle, with a round field of view
that is padded, clipped at both ends, noisy. Then each fault is made in the whole scan: what
`read_ct` says of it is counted. Needs no data; half a second a body on one CPU core. The limit for
false alarms is 1 %. The thresholds were set on other volumes: the open CTs and the phantoms of
seeds 0 to 39.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np

from foundation import VolumeWarning, read_ct
from foundation.evaluation import Figure, add_record_option, append_record, new_record, wilson
from foundation.synthesis import generate, render_ct

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
PADDINGS = (-1024, -2000, -2048, -3024, -32768)


def slab(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut 5 to 20 axial slices out."""
    size = int(rng.integers(5, 21))
    start = int(rng.integers(0, hu.shape[2] - size))
    return hu[:, :, start : start + size]


def middle(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut off up to a third on each side: arms and skin, and the air around them."""
    cuts = [int(rng.integers(0, size // 3)) for size in hu.shape]
    return hu[tuple(slice(cut, size - cut) for cut, size in zip(cuts, hu.shape, strict=True))]


def round_view(hu: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pad what lies outside of a circle."""
    x, y = np.indices(hu.shape[:2])
    centre = (np.array(hu.shape[:2]) - 1) / 2
    outside = np.hypot(x - centre[0], y - centre[1]) > max(hu.shape[:2]) / 2
    return np.where(outside[..., None], np.int16(rng.choice(PADDINGS)), hu)


NORMAL: dict[str, Change] = {
    "slab": slab,
    "middle": middle,
    "round field of view": round_view,
    "clipped": lambda hu, rng: hu.clip(-1024, rng.choice([250, 400, 1000, 3071])),
    "noisy": lambda hu, rng: hu + rng.normal(0, rng.uniform(10, 80), hu.shape).astype(np.float32),
}
FAULTS: dict[str, Change] = {
    "intercept applied twice": lambda hu, rng: hu - np.int16(1024),
    "intercept missing": lambda hu, rng: hu.clip(-1024) + np.int16(1024),
    "times ten": lambda hu, rng: hu.astype(np.int32) * 10,
    "halved": lambda hu, rng: hu * np.float32(0.5),
    "doubled": lambda hu, rng: hu * np.float32(2),
    "inverted": lambda hu, rng: -hu,
    "shifted by 200 HU": lambda hu, rng: hu + np.int16(200),
    "clipped at 200 HU": lambda hu, rng: hu.clip(None, 200),
    "padded MR": lambda hu, rng: np.where(hu > -300, np.abs(hu.astype(int) + 150) * 2, -1000),
    "voxels in disorder": lambda hu, rng: rng.permutation(hu.ravel()).reshape(hu.shape),
    "air alone": lambda hu, rng: rng.normal(-1000, 12, hu.shape).astype(np.float32),
}


def doubted(hu: np.ndarray, affine: np.ndarray) -> bool:
    """Whether reading a CT warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VolumeWarning)
        return bool(read_ct((hu, affine)).warnings)


def main() -> None:
    """Count and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=500, help="bodies")
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--spacing", type=float, nargs=2, default=[4.0, 8.0], metavar="MM")
    add_record_option(parser)
    given = parser.parse_args()
    began = time.perf_counter()
    alarms: Counter[str] = Counter()
    found: Counter[str] = Counter()
    looks: Counter[str] = Counter()
    kinds = list(NORMAL)
    for seed in range(given.first_seed, given.first_seed + given.count):
        rng = np.random.default_rng(seed)
        spacing_mm = float(rng.uniform(*given.spacing))
        body = generate(seed, spacing_mm)
        hu = np.rint(render_ct(body.label_map, body.names, spacing_mm, rng)).astype(np.int16)
        kind = kinds[seed % len(kinds)]
        for name, volume in (("whole", hu), (kind, NORMAL[kind](hu, rng))):
            looks[name] += 1
            if doubted(volume, body.affine):
                alarms[name] += 1
                print(f"false alarm: seed {seed}, {name}, {spacing_mm:.2f} mm", flush=True)
        for fault, change in FAULTS.items():
            found[fault] += doubted(change(hu, rng), body.affine)

    total, wrong = looks.total(), alarms.total()
    limits = wilson(wrong, total)
    figures = [Figure("false_alarms", 100 * wrong / total, "%", *(100 * x for x in limits), total)]
    figures += [
        Figure(f"false_alarms/{name}", 100 * alarms[name] / count, "%", n=count)
        for name, count in looks.items()
    ]
    figures += [
        Figure(f"found/{fault}", 100 * found[fault] / given.count, "%", n=given.count)
        for fault in FAULTS
    ]
    print(json.dumps({each.name: round(each.value or 0.0, 2) for each in figures}, indent=2))
    if given.record:
        record = new_record(
            "false_alarms",
            "real",
            arm={"spacing": "{} to {} mm".format(*given.spacing)},
            figures=figures,
            seconds=time.perf_counter() - began,
            seed=given.first_seed,
            note="Renderings of generated phantoms, which are no patients.",
        )
        append_record(given.record, record)


if __name__ == "__main__":
    main()
