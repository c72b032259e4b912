"""The datasets by name: those of the paper, whose descriptions are in `paper/`, and your own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from foundation.data import nnunet
from foundation.data.cases import safe_id
from foundation.data.dataset import Dataset
from foundation.data.description import read_description
from foundation.data.layouts import INDEX, DatasetJson
from foundation.errors import UsageError
from foundation.settings import suggestion
from foundation.taxonomy import classes_of

_HERE = Path(__file__).parent
_OPEN_DATA = "open-data"


@cache
def paper_datasets() -> Mapping[str, Dataset]:
    """Return the datasets of the paper, in the order of their numbers.

    Returns:
        Id → dataset.
    """
    found = [read_description(path) for path in sorted((_HERE / "paper").glob("*.yaml"))]
    return {dataset.id: dataset for dataset in found}


def get_dataset(name: str | Path) -> Dataset:
    """Return a dataset of the paper by id or name ("04", "LiTS"), or one of your own.

    Args:
        name: An id or a name; a YAML file; a folder in nnU-Net's raw format, or its dataset.json;
            or "open-data", whose description comes with the package.

    Returns:
        The dataset.

    Raises:
        UsageError: There is none of this name, or its description is wrong.
    """
    path, text = Path(name), str(name)
    if path.suffix.lower() in (".yaml", ".yml"):
        return read_description(path)
    if text == _OPEN_DATA:
        return read_description(_HERE / f"{_OPEN_DATA}.yaml")
    by_either = {
        key.lower(): each for each in paper_datasets().values() for key in (each.id, each.name)
    }
    if text.lower() in by_either:
        return by_either[text.lower()]
    index = path if path.name == INDEX else path / INDEX
    if index.is_file():
        return read_nnunet(index)
    near = difflib.get_close_matches(text.lower(), by_either, n=2, cutoff=0.5)
    raise UsageError(
        f"Unknown dataset {text!r}.{suggestion([by_either[key].name for key in near])} Give an id "
        "or a name of `universal-ct datasets`, a YAML file that describes your own, or a folder "
        "with nnU-Net's dataset.json."
    )


def read_nnunet(index: Path) -> Dataset:
    """Read a dataset in nnU-Net's raw format, whose dataset.json names its labels after classes.

    Args:
        index: Its dataset.json.

    Returns:
        The dataset, called as its folder is.

    Raises:
        UsageError: A label is named after none of the 32 classes, or the format is another.
    """
    labels = nnunet.read_labels(index)
    try:
        label_map = labels.label_map(classes_of)
    except UsageError as error:
        raise UsageError(
            f"{index}: {error} Or describe the dataset in YAML, where a class may have a name "
            "and a prompt of its own."
        ) from error
    annotated = tuple(dict.fromkeys(n for names in label_map.values() for n in names))
    name = safe_id(index.absolute().parent.name)
    return Dataset(
        name,
        name,
        label_map,
        annotated,
        DatasetJson(),
        unknown=labels.ignored,
        licence=labels.licence,
    )
