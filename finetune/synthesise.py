"""Synthetic CTs with labels from open label maps: new classes can be tried without more scans.

    python finetune/synthesise.py DATA OUT -n 5 --keep vertebrae_L1 sacrum liver [--cases ID …]

DATA holds a folder per label map: labels.nii.gz and labels.json (value → name, TotalSegmentator's).
OUT receives a folder per CT: ct.nii.gz, labels.nii.gz and labels.json, which `universal-ct
add-class --data OUT` reads. Each is another body: the map deformed, rendered with other grey
values, by another scanner. The same seed gives the same CTs; those that are there are kept.

A network that learns from them has seen the shapes of as many people as there are maps, however
many CTs are drawn. On two CPU cores a CT of 128³ voxels takes a few seconds. `--smoke` renders two
small ones from a generated body.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from foundation import UsageError, listed, recover_folder, replacing_folder
from foundation.data import Dataset, Patterns, Store, prepare, read_names
from foundation.synthesis import (
    FINE_MM,
    Anatomy,
    View,
    draw_view,
    phantom_anatomy,
    stored_anatomy,
)


@dataclass(frozen=True)
class Settings:
    """What to render.

    Attributes:
        count: How many CTs.
        size: Voxels along each axis.
        spacing_mm: Of the CTs, isotropic.
        keep: Labels to write; all if empty.
        cases: Maps to use, by the names of their folders; all if empty.
        seed: Of everything that is drawn.
    """

    count: int = 5
    size: int = 128
    spacing_mm: float = 3.0
    keep: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Body:
    """A label map to render.

    Attributes:
        anatomy: The label map.
        labelled: Every name that its source labels, present in it or not.
    """

    anatomy: Anatomy
    labelled: tuple[str, ...]


def main(given: Sequence[str] | None = None) -> None:
    """Read the command line, prepare the maps, render."""
    parser = argparse.ArgumentParser(description="Synthetic CTs with labels from label maps.")
    add = parser.add_argument
    add("data", type=Path, nargs="?", help="folder with a folder per label map")
    add("out", type=Path, nargs="?", help="folder that receives a folder per CT")
    add("-n", "--count", type=int, default=Settings.count, help="CTs to render (5)")
    add("--size", type=int, default=Settings.size, help="voxels along each axis (128)")
    add("--spacing", type=float, default=Settings.spacing_mm, help="of the CTs, mm (3)")
    add("--keep", nargs="+", default=[], metavar="LABEL", help="labels to write (all)")
    add("--cases", nargs="+", default=[], metavar="ID", help="maps to use, by folder (all)")
    add("--seed", type=int, default=Settings.seed)
    add("--smoke", action="store_true", help="two small CTs from a generated body")
    args = parser.parse_args(given)
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(count=2, size=32, spacing_mm=8.0, keep=("liver", "spleen"))
            phantom = phantom_anatomy(seed=0)
            body = Body(phantom, tuple(phantom.names.values()))
            made = render([body], settings, Path(folder))
            print("\n".join(path.name for path in made))
        return
    if args.data is None or args.out is None:
        parser.error("give DATA and OUT, or --smoke")
    settings = Settings(
        args.count, args.size, args.spacing, tuple(args.keep), tuple(args.cases), args.seed
    )
    with tempfile.TemporaryDirectory() as work:
        bodies = read_bodies(args.data, settings, Path(work))
        print("\n".join(str(path) for path in render(bodies, settings, args.out)))


def read_bodies(data: Path, settings: Settings, work: Path) -> list[Body]:
    """Read the label maps of a folder, at the spacing from which they are rendered.

    Args:
        data: A folder with a folder for each map.
        settings: Which maps to use.
        work: An empty folder for what is made on the way.

    Returns:
        The maps.

    Raises:
        UsageError: no map, or one that was asked for by a name that there is not.
    """
    layout = Patterns((), ("{id}/labels.nii.gz",), names_file="{id}/labels.json")
    dataset = Dataset("maps", "maps", {}, (), layout, open_names=True)
    found = {case.id: case for case in dataset.find(data)}
    if lost := sorted(set(settings.cases) - set(found)):
        raise UsageError(f"{data} has no map {listed(lost)}; it has {listed(list(found), 20)}.")
    report = prepare([(dataset, data)], work, spacing_mm=FINE_MM, workers=1, progress=False)
    if report.failed:
        raise UsageError(f"Maps that cannot be used: {dict(report.failed)}")
    store = Store(work)
    return [
        Body(stored_anatomy(store.case(f"maps/{id_}")), tuple(read_names(case.names_file).values()))
        for id_, case in found.items()
        if case.names_file and (not settings.cases or id_ in settings.cases)
    ]


def render(bodies: Sequence[Body], settings: Settings, out: Path) -> list[Path]:
    """Render one CT after the other, from the maps in turn.

    Args:
        bodies: The maps.
        settings: What to render.
        out: Receives a folder for each CT; those that are there are kept.

    Returns:
        The folders.

    Raises:
        UsageError: none of the maps labels what is to be kept.
    """
    useful = [body for body in bodies if kept(body, settings)]
    if not useful:
        there = sorted({name for body in bodies for name in body.labelled})
        raise UsageError(
            f"No map labels {listed(settings.keep)}; their labels are {listed(there, 40)}."
        )
    for body in useful:
        aim(body, kept(body, settings))
    made = []
    for number in range(settings.count):
        body = useful[number % len(useful)]
        name = re.sub(r"[^A-Za-z0-9_-]", "_", body.anatomy.name.rpartition("/")[2])
        folder = out / f"{number:03d}_{name}"
        made.append(folder)
        recover_folder(folder)
        if folder.exists():
            continue
        rng = np.random.default_rng((settings.seed, number))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        # Lesions would take voxels from organs whose names the files give.
        view = draw_view(
            body.anatomy, settings.size, settings.spacing_mm, rng, generator, lesions=False
        )
        with replacing_folder(folder) as temporary:
            write(temporary, view, kept(body, settings), settings.spacing_mm)
    return made


def kept(body: Body, settings: Settings) -> tuple[str, ...]:
    """Return the labels of a map that are to be written.

    Args:
        body: The map.
        settings: What to keep.

    Returns:
        Names of labels.
    """
    wanted = settings.keep or body.labelled
    return tuple(name for name in body.labelled if name in wanted and name != "body")


def aim(body: Body, names: Sequence[str]) -> None:
    """Centre views at the height of the structures that are kept, each alike, in mid body.

    Args:
        body: The map; the places that views are centred on are changed.
        names: Labels that are kept.
    """
    rng = np.random.default_rng(0)
    anatomy = body.anatomy
    values = {name: value for value, name in anatomy.names.items() if name in names}
    middle = np.argwhere(anatomy.label_map[::4, ::4, ::4] > 0).mean(axis=0) * 4
    found = {}
    for name, value in sorted(values.items()):
        voxels = np.argwhere(anatomy.label_map == value)
        if len(voxels):
            # The key is no class: these are heights, not the places of an organ that may swell.
            key = f"height of {name}"
            found[key] = voxels[rng.integers(len(voxels), size=500)]
            found[key][:, :2] = middle[:2]
    anatomy.centres = found or anatomy.centres


def write(folder: Path, view: View, names: Sequence[str], spacing_mm: float) -> None:
    """Write a CT and its labels.

    A name that this view does not show is labelled all the same: as absent.

    Args:
        folder: Where the files go.
        view: The CT.
        names: Labels to write, numbered from 1.
        spacing_mm: Of the view.
    """
    values = {name: number for number, name in enumerate(names, start=1)}
    table = np.zeros(256, np.uint8 if len(names) < 256 else np.uint16)
    for value, name in view.names.items():
        table[value] = values.get(name, 0)
    labels: NDArray[np.integer] = table[view.labels.numpy().astype(int)]
    labels[~view.covered.numpy()] = 0
    affine = np.diag([*[spacing_mm] * 3, 1.0])
    hu = np.rint(view.hu.numpy()).clip(-1024, 3071).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, affine), folder / "ct.nii.gz")
    nib.save(nib.Nifti1Image(labels, affine), folder / "labels.nii.gz")
    text = json.dumps({str(number): name for name, number in values.items()}, indent=1)
    (folder / "labels.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
