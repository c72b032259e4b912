"""Which classes the labels of somebody's own files stand for: those to learn, and those known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache

from foundation.config import check_class_name
from foundation.errors import UsageError, listed
from foundation.settings import suggestion
from foundation.taxonomy import (
    PAIRED,
    TOTALSEGMENTATOR,
    normalise,
    organ_around,
    pair_of,
    resolve,
)

_SIDES = ("left", "right")
_MOST_LABELS = 200  # named in a note; TotalSegmentator has 117


@dataclass(frozen=True)
class NewClass:
    """A class to learn; one that the model has already is tuned further.

    Attributes:
        name: What it is called.
        prompt: Its sentence; made from the name if not given.
        parent: The class that a lesion lies in.
        labels: What the files call it. Several are its parts, all of which must be there; in a
            part, * stands for any characters ("livertumor*"), and one label that fits is enough.
            Not given: its name in any spelling, or the two sides of it. Numbers are values of
            label maps that come without names.
    """

    name: str
    prompt: str | None = None
    parent: str | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_class_name(self.name, self.prompt)


@lru_cache(maxsize=4096)
def spellings(name: str) -> frozenset[str]:
    """Return keys that all spellings of one name share.

    "vertebrae_L1", "Vertebra L1" and "L1 vertebra" have one in common.

    Args:
        name: Of a class or a source label.

    Returns:
        The keys.
    """
    from foundation.text import load_bank

    words = normalise(name).replace("vertebrae", "vertebra").split()
    singular = " ".join(word.removesuffix("s") if len(word) > 3 else word for word in words)
    term = load_bank().find(name)
    return frozenset({singular} | ({normalise(term)} if term else set()))


def stands_for(wanted: str, label: str) -> bool:
    """Tell whether a name or a pattern means a source label.

    Args:
        wanted: A name in any spelling, or a pattern in which * stands for any characters.
        label: The source label.

    Returns:
        Whether it does.
    """
    if "*" in wanted:
        return fnmatchcase(*(re.sub(r"[ _-]+", "_", text.lower()) for text in (label, wanted)))
    return bool(spellings(wanted) & spellings(label))


@dataclass(frozen=True)
class Naming:
    """What source labels mean to a model with the classes `old` that is to learn `new`.

    A class that is in both is one to learn: it keeps the model's name for it, and is no longer in
    `old`. Its labels are those that the model's class has, unless it names its own.

    Attributes:
        new: The classes to learn.
        old: The known classes that are not to learn.
        model: Classes whose labels are those that the model's class has.

    Raises:
        UsageError: Two classes to learn of one name.
    """

    new: tuple[NewClass, ...]
    old: tuple[str, ...]
    model: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for each in self.new:
            if (other := seen.setdefault(normalise(each.name), each.name)) != each.name:
                raise UsageError(f"{each.name!r} and {other!r} are one class; name it once.")
        if len(seen) < len(self.new):
            raise UsageError(f"A class is named twice: {listed([c.name for c in self.new])}.")
        names = {normalise(name): name for name in self.old}
        new = tuple(replace(c, name=names.get(normalise(c.name), c.name)) for c in self.new)
        elsewhere = {each.name for each in new if each.labels}
        object.__setattr__(self, "model", tuple(n for n in self.old if n not in elsewhere))
        object.__setattr__(self, "new", new)
        known = tuple(name for name in self.old if normalise(name) not in seen)
        object.__setattr__(self, "old", known)

    def classes(self, label: str) -> tuple[str, ...]:
        """Return the classes of a voxel with this source label; both sides of a merged pair.

        Args:
            label: A source label.

        Returns:
            Names of classes; none for a label of no class.
        """
        new, known = self._new(label), known_classes(label, self.model)
        found = [each.name for each in new]
        if not (new and known in PAIRED.values()):  # its sides would both be everywhere
            found += known
        for each in new:
            found += self._parents(each, label) or ()
        return tuple(dict.fromkeys(found))

    def annotated(self, labels: Collection[str]) -> tuple[str, ...]:
        """Return the classes that are wholly labelled where these source labels are.

        Args:
            labels: The source labels that a scan has.

        Returns:
            Names of classes.
        """
        found = [each.name for each in self.new if self.has(each, labels)]
        spoilt: set[str] = set()
        for label in labels:
            for each in self._new(label):
                if self._parents(each, label) is None:  # in one of two sides, unknown which
                    spoilt |= set(known_classes(str(each.parent), self.model))
        found += self._known_in(labels)
        return tuple(name for name in dict.fromkeys(found) if name not in spoilt)

    def has(self, wanted: NewClass, labels: Collection[str]) -> bool:
        """Tell whether these source labels hold all of a class to learn.

        Args:
            wanted: The class.
            labels: The source labels that a scan has.

        Returns:
            Whether they do.
        """
        if wanted.labels:
            return all(any(stands_for(own, each) for each in labels) for own in wanted.labels)
        there = frozenset().union(*(spellings(label) for label in labels))
        keys = spellings(wanted.name)
        sides = [{f"{key} {side}" for key in keys} for side in _SIDES]
        if keys & there or all(side & there for side in sides):
            return True
        return wanted.name in self._known_in(labels)

    def read_as(self, labels: Collection[str]) -> str:
        """Say which of these source labels are read as what, and which are of no class.

        Args:
            labels: The source labels of all scans.

        Returns:
            One or two sentences; empty without labels.
        """
        classes = {label: self.classes(label) for label in sorted(labels)}
        read = [f"{label} as {' and '.join(names)}" for label, names in classes.items() if names]
        ignored = [label for label, names in classes.items() if not names]
        both = (("Labels read", read), ("Ignored, as of no class", ignored))
        return " ".join(f"{what}: {listed(found, _MOST_LABELS)}." for what, found in both if found)

    def require(self, labels: Collection[str], where: str) -> None:
        """Refuse files that hold no label of a class to learn.

        Args:
            labels: The source labels of all scans.
            where: What holds them, for the error.

        Raises:
            UsageError: Names the class, the labels there are, and what may be meant.
        """
        for each in self.new:
            if self.has(each, labels):
                continue
            wanted = " and ".join(repr(label) for label in each.labels or (each.name,))
            near = [n for label in each.labels or (each.name,) for n in nearest(label, labels)]
            there = listed(sorted(labels), 30) or "none with a name: add labels.json"
            raise UsageError(
                f"No scan in {where} has the label {wanted} of class {each.name!r}."
                f"{suggestion(dict.fromkeys(near))} "
                f"The labels there are: {there}. Say what the files call it: --label "
                f"'{each.name}=…' on the command line, `labels` of the NewClass in Python."
            )

    # --- one label ------------------------------------------------------------------------------

    def _new(self, label: str) -> list[NewClass]:
        keys = spellings(label)
        keys |= {_without_side(key) for key in keys}
        return [
            each
            for each in self.new
            if (
                any(stands_for(own, label) for own in each.labels)
                if each.labels
                else spellings(each.name) & keys
            )
        ]

    def _known_in(self, labels: Collection[str]) -> list[str]:
        """The model's classes that are wholly labelled where these labels are."""
        found: list[str] = []
        for label in labels:
            known = known_classes(label, self.model)
            is_part = TOTALSEGMENTATOR.get(label, label) != label
            whole = all(parts_of(name) <= set(labels) for name in known if is_part)
            if whole and not (known in PAIRED.values() and self._new(label)):
                found += known
        return found

    def _parents(self, child: NewClass, label: str) -> tuple[str, ...] | None:
        """The classes around a lesion; None where it may be either of two sides."""
        if child.parent is None:
            return ()
        for each in self.new:
            if normalise(each.name) == normalise(child.parent):
                return (each.name,)
        known = known_classes(child.parent, self.model)
        if known not in PAIRED.values():
            return known
        organ = organ_around(known[0].rpartition("_")[0], label, child.name)
        return (organ,) if organ else None


def parts_of(name: str) -> set[str]:
    """Return the labels of TotalSegmentator that make up a class together, such as a lung's lobes.

    Args:
        name: Of a class.

    Returns:
        Labels; none where a label has the name of the class.
    """
    return {label for label, whole in TOTALSEGMENTATOR.items() if whole == name != label}


@lru_cache(maxsize=4096)
def known_classes(label: str, old: tuple[str, ...]) -> tuple[str, ...]:
    """Return which of `old` a source label stands for, if any; both sides where it merges them.

    Args:
        label: The source label.
        old: Names of the known classes.

    Returns:
        Names of classes, or none.
    """
    if label in old:
        return (label,)
    if label in TOTALSEGMENTATOR:
        name = TOTALSEGMENTATOR[label]
        return (name,) if name in old else ()
    if (pair := pair_of(label)) and set(pair) <= set(old):
        return pair
    keys = spellings(label)
    for name in old:
        if spellings(name) & keys:
            return (name,)
    try:
        return (resolve(label, old),)
    except UsageError:
        return ()


def nearest(name: str, labels: Collection[str]) -> list[str]:
    """Return up to four labels that a name may mean.

    Args:
        name: What was wanted.
        labels: The source labels that there are.

    Returns:
        Labels, the most likely first.
    """
    by_key: dict[str, list[str]] = {}
    for label in sorted(labels):
        by_key.setdefault(_without_side(normalise(label)), []).append(label)
    key = _without_side(normalise(name))
    close = difflib.get_close_matches(key, by_key, n=3, cutoff=0.6)
    holding = [other for other in by_key if set(key.split()) & set(other.split())]
    found = [label for other in dict.fromkeys([*close, *holding]) for label in by_key[other]]
    return found[:4]


def _without_side(key: str) -> str:
    return re.sub(r" (left|right)$", "", key)
