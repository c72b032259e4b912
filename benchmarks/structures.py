"""Scans with a mask for each structure, in TotalSegmentator's layout: what finished weights learn.

    found = open_structures(lab, ["universal-ct"])    # TotalSegmentator, or the world's structures
    scans = few_scans(found, cases, ["heart"], folder)     # links to those masks alone
    tests = test_sets(lab, found, ["heart"])    # without the scans that the weights have seen

The scripts that add classes, or move weights to a task, read one kind of tree in all sizes. In the
generated ones it is written from the world.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml
from experiment_data import TestSet
from lab import Lab
from runs import Run
from world import NEW_STRUCTURES, World

from foundation import (
    CLASSES,
    DatasetWarning,
    NewClass,
    UniversalModel,
    UsageError,
    from_pretrained,
    get_dataset,
    replacing,
    replacing_folder,
)
from foundation.pretraining import trained_on
from foundation.tuning import TuningRun, fewshot_subsets, get_method, read_meta

NAMES = {each.name for each in CLASSES}
VERSIONS = {"15": 1, "15_v2": 2}
_SOURCE = "source.json"


@dataclass(frozen=True)
class Structures:
    """A tree of scans with masks, and its splits.

    Attributes:
        folder: A folder for each scan (ct.nii.gz, segmentations/*.nii.gz), and meta.csv.
        dataset: "15" or "15_v2"; None for the world's.
        splits: train, val and test → ids of scans, without those that were to be left out.
        left_out: Ids of scans that are left out, since weights have seen them.
        note: Says so, for records.
    """

    folder: Path
    dataset: str | None
    splits: Mapping[str, list[str]]
    left_out: frozenset[str] = frozenset()
    note: str = ""

    @property
    def version(self) -> int:
        """Of TotalSegmentator."""
        return VERSIONS.get(self.dataset or "", 1)

    def masks(self, case: str, names: Sequence[str]) -> dict[str, Path]:
        """Return the files of a scan's masks.

        Args:
            case: Id of the scan.
            names: Of the structures.

        Raises:
            UsageError: It has no mask of one.
        """
        folder = self.folder / case / "segmentations"
        files = {name: folder / f"{name}.nii.gz" for name in names}
        if lost := [name for name, path in files.items() if not path.is_file()]:
            raise UsageError(f"{folder} has no mask of {', '.join(lost)}.")
        return files

    def showing(self, names: Sequence[str], seed: int) -> Iterator[str]:
        """Yield training scans in which every structure is seen, in an order of the seed's.

        Args:
            names: Of the structures.
            seed: The first n scans are among the first n + 1.
        """
        cases = self.splits["train"]
        for case in fewshot_subsets(cases, [len(cases)], seed)[len(cases)]:
            files = self.masks(case, names)
            if all(np.any(nib.load(path).dataobj) for path in files.values()):
                yield case


def open_structures(lab: Lab, models: Sequence[str]) -> Structures:
    """Open the tree that the command line names, or the world's.

    Args:
        lab: Of the experiment.
        models: Names or folders of weights. What they were trained on, by their records, is left
            out of every split.

    Raises:
        UsageError: Another dataset than TotalSegmentator was given.
    """
    if lab.generated:
        with lab.data.alone(f"structures-{lab.size}") as folder:
            write_structures(lab.data.world, folder)
        return Structures(folder, None, read_meta(folder))
    given = [text.partition("=") for text in lab.given.data]
    if len(given) != 1 or given[0][0] not in VERSIONS:
        raise UsageError("Give TotalSegmentator as 15=DIR (version 1) or 15_v2=DIR.")
    name, folder = given[0][0], Path(given[0][2])
    dataset, notes = get_dataset(name), list[str]()
    cases, seen = dataset.find(folder), set[str]()
    for model in models:
        if (record := trained_on(model)) is None:
            notes.append(f"What {Path(model).name} was trained on is not recorded.")
        else:
            seen |= set(record.among(dataset, cases))
    if seen:
        notes.append(f"Left out, since weights saw them: {', '.join(sorted(seen))}.")
    splits = {
        split: [case for case in ids if case not in seen]
        for split, ids in read_meta(folder).items()
    }
    return Structures(folder, name, splits, frozenset(seen), " ".join(notes))


def write_structures(world: World, folder: Path) -> Path:
    """Write the world's `structures` as TotalSegmentator has its scans; what lies there is kept.

    Args:
        world: One of six of its training scans becomes a validation scan.
        folder: Appears whole.

    Raises:
        UsageError: The folder holds the structures of another world.
    """
    wanted = {name: world.sha256[name] for name in ("structures", "structures_test")}
    if folder.exists():
        path = folder / _SOURCE
        if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != wanted:
            raise UsageError(f"{folder} is of another world; delete it, or give another folder.")
        return folder
    rows = ["image_id;split"]
    with replacing_folder(folder) as temporary:
        for name, split in (("structures", "train"), ("structures_test", "test")):
            description, root = world.dataset(name)
            dataset = get_dataset(description)
            cases = dataset.find(root)
            validation = max(1, len(cases) // 6) if split == "train" else 0
            for number, case in enumerate(cases):
                assert case.image is not None
                place = temporary / case.id / "segmentations"
                place.mkdir(parents=True)
                (place.parent / "ct.nii.gz").symlink_to(case.image.resolve())
                image = nib.load(case.labels[0])
                labels = np.asanyarray(image.dataobj)
                for structure in NEW_STRUCTURES:
                    values = [
                        int(v) for v, names in dataset.label_map.items() if structure in names
                    ]
                    mask = nib.Nifti1Image(np.isin(labels, values).astype(np.uint8), image.affine)
                    nib.save(mask, place / f"{structure}.nii.gz")
                late = number >= len(cases) - validation
                rows.append(f"{case.id};{'val' if late else split}")
        (temporary / "meta.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        (temporary / _SOURCE).write_text(json.dumps(wanted), encoding="utf-8")
    return folder


def few_scans(found: Structures, cases: Sequence[str], names: Sequence[str], folder: Path) -> Path:
    """Make a folder of scans that label some structures and nothing else, as links.

    So a class is new: the scans say nothing of those that the weights know.

    Args:
        found: The tree.
        cases: Ids of scans.
        names: Of the structures.
        folder: Is made, or was made by the same call.
    """
    for case in cases:
        links = {"ct.nii.gz": found.folder / case / "ct.nii.gz"}
        for name, path in found.masks(case, names).items():
            links[f"segmentations/{name}.nii.gz"] = path
        for name, path in links.items():
            link = folder / case / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(path.resolve())
    return folder


def test_sets(lab: Lab, found: Structures, names: Sequence[str]) -> list[TestSet]:
    """Return the scans to measure on, with labels of the structures and of the taxonomy's classes.

    A structure is a class of its own also where it is a part of one, as a lobe of a lung is.

    Args:
        lab: Of the experiment.
        found: The tree.
        names: Of the structures.
    """
    if found.dataset is None:
        (every,) = lab.data.tests(("structures_test",))
        few = tuple(found.splits["test"][:2]) if lab.size == "smoke" else None
        return [replace(every, cases=few)]
    classes: dict[str, list[Any]] = {
        str(label): list(of) for label, of in get_dataset(found.dataset).label_map.items()
    }
    for name in names:
        if name not in classes.setdefault(name, []):
            classes[name].append(name if name in NAMES else {"name": name})
    content = {
        "name": f"{found.dataset}-structures",
        "layout": "per-structure",
        "images": "**/{id}/ct.nii.gz",
        "labels": "**/{id}/segmentations/*.nii.gz",
        "splits": "meta.csv",
        "rule": "annotated_where_masks_are",
        "classes": classes,
    }
    path = lab.output / "structures.yaml"
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return [TestSet(str(path), str(found.folder), tuple(found.splits["test"]))]


# --- weights --------------------------------------------------------------------------------------


def start_of(run: Run, text: str = "minilm", spare: int = 0) -> UniversalModel:
    """Return the weights to start from: those of -m, or of the world, trained once for each seed.

    Args:
        run: Any run of the seed.
        text: What names the classes in the world's training: "minilm" or "one-hot".
        spare: Places of one-hot vectors for classes that come later.

    Raises:
        UsageError: The weights have no text-driven head.
    """
    lab = run.lab
    if lab.generated:
        one_hot = {"model.standardise_text": False, "model.spare_places": spare}
        return run.pretrain({"model.text": text, **(one_hot if text == "one-hot" else {})})
    model = from_pretrained(lab.given.model)
    if not isinstance(model, UniversalModel):
        raise UsageError(f"{lab.given.model} has no text-driven head; give weights that have one.")
    return model


def hashes_of(lab: Lab, *models: str) -> dict[str, str]:
    """Return name → SHA-256 of the files of weights, for records; nothing in a generated world.

    Args:
        lab: Of the experiment.
        models: Names or folders of weights.
    """
    if lab.generated:
        return {}
    found = {name: from_pretrained(name).weights_sha256 for name in models}
    return {Path(name).name: sha256 for name, sha256 in found.items() if sha256}


def learn(
    run: Run,
    base: UniversalModel,
    scans: Path,
    names: Sequence[str],
    method: str,
    settings: Mapping[str, Any],
    folder: str = "tuning",
) -> UniversalModel:
    """Teach weights new classes by a method of `METHODS`, or go on where that stopped.

    All of the scans are trained on, and the best step is chosen on them.

    Args:
        run: Of the arm.
        base: Is not changed.
        scans: As of `few_scans`.
        names: Of the structures.
        method: "head", "lora", "full" or "continual".
        settings: Of the method; no part of it takes more steps than `--max-steps`.
        folder: Within that of the run.
    """
    most = {key: run.steps(settings[key]) for key in ("steps", "probe") if key in settings}
    if run.lab.generated:  # the loss looks at as many voxels as in the training of the weights
        most["voxels"] = run.lab.plan.settings["loss"]["sample_voxels"]
    tuning = TuningRun(
        base,
        get_method(method, **{**settings, **most}),
        run.folder / folder,
        seed=run.seed or 0,
        device="cpu" if run.cpu else "auto",
        progress=not run.lab.generated,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)  # no scan is held out on purpose
        tuning.read(scans, [NewClass(n, labels=(n,)) for n in names], validation=0)
    tuning.train()
    return tuning.model.eval()
