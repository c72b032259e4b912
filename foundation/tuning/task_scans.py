"""The scans of a task in a TotalSegmentator tree: its splits, a subset of them, prepared."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from foundation.data.naming import NewClass
from foundation.data.reading import read_label_map
from foundation.errors import UsageError, listed
from foundation.tuning.data import Split, TuningData, read_data
from foundation.tuning.tasks import SIZES, fewshot_subsets, read_meta, write_subsets

_SUBSETS = "subsets.json"


def read_task(
    folder: str | Path,
    classes: Sequence[str],
    *,
    work: str | Path,
    spacing_mm: float,
    shots: int | None = None,
    seed: int = 0,
    without: Collection[str] = (),
    workers: int | None = 1,
    progress: bool = True,
) -> TuningData:
    """Prepare the scans of meta.csv's splits, and of the training scans a subset if one is wanted.

    A few scans do not show every class. A class that none of them shows is learnt as absent.

    Args:
        folder: Of the dataset: a folder for each scan, and meta.csv.
        classes: Names of the structures to learn, as their files are called.
        work: Receives the prepared scans, the splits and subsets.json.
        spacing_mm: Of the prepared scans.
        shots: Number of training scans, nested by seed; None for all.
        seed: Of the subsets.
        without: Ids of scans to leave out of every split, e.g. those that weights have seen.
        workers: As of `read_data`.
        progress: Show a bar.

    Raises:
        UsageError: No meta.csv, a split without scans, fewer training scans than `shots`, masks
            that are missing, or none of the classes in any training scan.
    """
    folder, work = Path(folder), Path(work)
    splits = {
        name: [case for case in cases if case not in without]
        for name, cases in read_meta(folder).items()
    }
    if empty := [name for name in ("train", "test") if not splits[name]]:
        raise UsageError(f"{folder / 'meta.csv'} has no scan for {' or '.join(empty)}.")
    chosen = splits["train"]
    if shots is not None:
        if shots > len(chosen):
            raise UsageError(f"shots is {shots}; {folder} has {len(chosen)} training scans.")
        subsets = fewshot_subsets(chosen, (*SIZES, shots), seed)
        write_subsets(work / _SUBSETS, subsets, seed)
        chosen = subsets[shots]
    shown = _most_shown(folder, chosen, classes)
    return read_data(
        folder,
        # A class to learn must be in a training scan. Of a few scans that is known of one class;
        # the others are taken as known ones, which may be absent, and are trained all the same.
        classes=[NewClass(shown, labels=(shown,))],
        old_classes=[name for name in classes if name != shown],
        work=work,
        spacing_mm=spacing_mm,
        split=Split(
            seed=seed,
            train_ids=None if shots is None else frozenset(chosen),
            without=frozenset(without),
        ),
        skip_broken=True,
        workers=workers,
        progress=progress,
    )


def _most_shown(folder: Path, ids: Sequence[str], classes: Sequence[str]) -> str:
    """The class with the most voxels in the first of these scans that shows any.

    Raises:
        UsageError: No scan is there, its labels are of another version, or all masks are empty.
    """
    for id_ in ids:
        place = folder / id_ / "segmentations"
        masks = {path.name.split(".nii")[0]: path for path in place.glob("*.nii*")}
        if masks and (missing := [name for name in classes if name not in masks]):
            raise UsageError(
                f"{place} has no {listed(missing)}. Is it of the other version of the dataset, or "
                "only a part of it? Give the version that it is, or the whole dataset."
            )
        sizes = {
            name: int(np.count_nonzero(read_label_map(masks[name])[0])) for name in classes if masks
        }
        if sizes and max(sizes.values()):
            return max(sizes, key=lambda name: sizes[name])
    raise UsageError(
        f"None of the {len(ids)} training scans in {folder} shows any of {listed(list(classes))}. "
        "Give the folder with meta.csv and a folder per scan, or more shots."
    )
