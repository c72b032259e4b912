"""The labels of a dataset in nnU-Net's raw format, as its `dataset.json` gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from foundation.data.layouts import read_dataset_json
from foundation.errors import UsageError

_NO_CT = ("mr", "t1", "t2", "flair", "adc", "pet")
LabelValues = Mapping[int | str, tuple[str, ...]]


@dataclass(frozen=True)
class Labels:
    """The labels of a dataset in nnU-Net's format, without its background.

    Attributes:
        values: Name → its values; a region has several, and then values have several names.
        ignored: Values whose voxels may be anything.
        licence: As the index gives it.
    """

    values: Mapping[str, tuple[int, ...]]
    ignored: tuple[str, ...]
    licence: str | None

    def label_map(self, classes_of: Callable[[str], tuple[str, ...]]) -> LabelValues:
        """Return value → classes, from the classes of each name; values without any left out.

        Args:
            classes_of: Gives the classes of a name of `values`, or none.

        Returns:
            Label value → classes.
        """
        found: dict[int | str, tuple[str, ...]] = {}
        for name, values in self.values.items():
            if classes := classes_of(name):
                for value in values:
                    found[value] = tuple(dict.fromkeys((*found.get(value, ()), *classes)))
        return found


def read_labels(index: Path) -> Labels:
    """Read the labels that a `dataset.json` names, in the format of version 1 or 2.

    Args:
        index: The dataset.json.

    Returns:
        Its labels, without the background.

    Raises:
        UsageError: It has no labels, a label has no whole number, or the scans are no CT.
    """
    content = read_dataset_json(index)
    channels = content.get("channel_names") or content.get("modality") or {}
    kind = str(next(iter(channels.values()), "CT")) if isinstance(channels, dict) else "CT"
    if kind.lower().startswith(_NO_CT):
        raise UsageError(f"{index} says that its scans are {kind}; only CT can be used.")
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise UsageError(f"{index} has no labels: it is not nnU-Net's format.")
    if all(isinstance(name, str) for name in labels.values()):  # version 1 has value → name
        labels = {name: value for value, name in labels.items()}
    found: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        try:
            found[name] = tuple(int(v) for v in (value if isinstance(value, list) else [value]))
        except (TypeError, ValueError) as error:
            raise UsageError(f"{index}: label {name!r} has the value {value!r}.") from error
    ignored = tuple(str(value) for value in found.pop("ignore", ()))
    licence = content.get("licence")
    return Labels(
        {name: values for name, values in found.items() if 0 not in values},
        ignored,
        licence if isinstance(licence, str) else None,
    )
