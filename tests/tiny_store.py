"""Small prepared stores and configurations, for tests of the pretraining engine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from anatomies import ball

from foundation.data.store.arrays import FORMAT_VERSION
from foundation.data.store.harmonise import Harmonised
from foundation.data.store.writing import write_case

SPACING_MM = 4.0
SHAPE = (28, 24, 26)
# Three datasets that label different things in alike bodies: dataset → value → classes.
DATASETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "03": ((), ("liver",)),
    "04": ((), ("liver",), ("liver", "liver_tumor")),
    "10_09": ((), ("spleen",)),
}
CASES = 3  # of each dataset


def body(seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """HU (X, Y, Z) of fat with a liver, a tumour in it and a spleen, and their masks."""
    rng = np.random.default_rng(seed)
    masks = {
        "liver": ball(SHAPE, tuple(np.array((19, 12, 14)) + rng.uniform(-1, 1, 3)), 6.0),
        "spleen": ball(SHAPE, tuple(np.array((7, 9, 15)) + rng.uniform(-1, 1, 3)), 4.0),
    }
    masks["liver_tumor"] = ball(SHAPE, (19, 12, 14), 2.5)
    hu = np.full(SHAPE, -90.0)
    for name, value in (("liver", 110), ("spleen", 180), ("liver_tumor", 30)):
        hu[masks[name]] = value
    return (hu + rng.normal(0, 10, SHAPE)).astype(np.int16), masks


def write_store(path: Path, cases: int = CASES) -> Path:
    """A store of `DATASETS`, each of so many cases; the last of each knows nothing below z 4."""
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "spacing_mm": SPACING_MM,
        "cases": {},
        "failed": {},
    }
    for number, (dataset, sets) in enumerate(DATASETS.items()):
        for case in range(cases):
            hu, masks = body(10 * number + case)
            labels = np.zeros(SHAPE, np.uint8)
            for value, names in enumerate(sets):
                if names:
                    labels[masks[names[-1]]] = value
            unknown = len(sets)
            if case == cases - 1:
                labels[:, :, :4] = unknown
            classes = tuple(dict.fromkeys(name for names in sets for name in names))
            harmonised = Harmonised(
                ct=hu,
                labels=labels,
                affine=np.diag([SPACING_MM] * 3 + [1.0]),
                spacing_mm=SPACING_MM,
                sets=(*sets, ()),
                tissues=("", *(names[-1] for names in sets[1:]), "unknown"),
                unknown=(unknown,),
                annotated=classes,
            )
            folder = path / "cases" / dataset / f"case_{case}"
            folder.mkdir(parents=True)
            about = {"dataset": dataset, "id": f"case_{case}", "weight": 1.0, "sources": []}
            entry = write_case(folder, harmonised, about)
            key = f"{dataset}/case_{case}"
            manifest["cases"][key] = {**entry, "folder": f"cases/{key}"}
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


def tiny_config(store: Path | None = None, **changes: Any) -> dict[str, Any]:
    """A run of six steps on two grids that takes a second; `changes` replace whole entries."""
    values = {
        "name": "tiny",
        "model": {
            "backbone": "lite_unet",
            "backbone_options": {"widths": [16, 16, 16], "full": 16},
            "text": "one-hot",
            "hu_windows": [[-175, 250], [-1000, 1000]],
        },
        "sources": [{"kind": "scans", "crops": {"background": 1, "foreground": 2}}],
        "stages": [
            {"steps": 2, "patch_size": 16, "spacing_mm": 8, "batch_size": 2},
            {"steps": 4, "patch_size": 16, "spacing_mm": 4, "batch_size": 2},
        ],
        "optimizer": {"learning_rate": 3e-3, "clip_norm": 5.0},
        "schedule": {"kind": "trapezoid", "warm_up": 2, "decay": 0.5},
        "loss": {
            **{"dice": 1, "binary": 0.2, "exclusive": 1, "balance": 0.5, "auxiliary": 1},
            "sample_voxels": 1000,
        },
        "ema": 0.9,
        "save_every": 2,
        "workers": 0,
        "logging": {"every": 1},
        "store": None if store is None else str(store),
    }
    return {**values, **changes}
