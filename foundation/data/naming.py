"""Which classes the labels of somebody's own files stand for: those to learn, and those known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from foundation.config import check_class_name
from foundation.errors import UsageError, listed
from foundation.taxonomy import PAIRED, TOTALSEGMENTATOR, normalise, resolve

_SIDES = ("left", "right")


@dataclass(frozen=True)
class NewClass:
    """A class to learn.

    prompt: its sentence; made from the name if not given. parent: the class that a lesion lies in.
    labels: what the files call it; several are its parts, all of which must be there. Not given:
    its name in any spelling, or the two sides of it. Numbers are values of label maps that come
    without names.
    """

    name: str
    prompt: str | None = None
    parent: str | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_class_name(self.name, self.prompt)


@lru_cache(maxsize=4096)
def spellings(name: str) -> frozenset[str]:
    """Keys that spellings of one name share: "vertebrae_L1", "Vertebra L1", "L1 vertebra"."""
    from foundation.text import load_bank

    words = [_singular(word) for word in normalise(name).split()]
    term = load_bank().find(name)
    return frozenset({" ".join(words)} | ({normalise(term)} if term else set()))


def _singular(word: str) -> str:
    if word == "vertebrae":
        return "vertebra"
    return word.removesuffix("s") if len(word) > 3 else word


@dataclass(frozen=True)
class Naming:
    """What source labels mean to a model with the classes `old` that is to learn `new`.

    A class that is in both is one to learn.

    Raises:
        UsageError: no class to learn, or two of one name.
    """

    new: tuple[NewClass, ...]
    old: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.new:
            raise UsageError("No class to learn was given; name at least one.")
        seen: dict[str, str] = {}
        for each in self.new:
            if (other := seen.setdefault(normalise(each.name), each.name)) != each.name:
                raise UsageError(f"{each.name!r} and {other!r} are one class; name it once.")
        if len(seen) < len(self.new):
            raise UsageError(f"A class is named twice: {listed([c.name for c in self.new])}.")
        known = tuple(name for name in self.old if normalise(name) not in seen)
        object.__setattr__(self, "old", known)

    def classes(self, label: str) -> tuple[str, ...]:
        """The classes a voxel with this source label belongs to; both sides of a merged pair."""
        new = self._new(label)
        found = [each.name for each in new]
        if not (new and self._is_pair(self._known(label))):  # its sides would both be everywhere
            found += self._known(label)
        for each in new:
            found += self._parents(each, label) or ()
        return tuple(dict.fromkeys(found))

    def annotated(self, labels: Collection[str]) -> tuple[str, ...]:
        """The classes that are wholly labelled where these source labels are."""
        found = [each.name for each in self.new if self.has(each, labels)]
        spoilt: set[str] = set()
        for label in labels:
            known, new = self._known(label), self._new(label)
            whole = all(self._parts(name) <= set(labels) for name in known if self._is_part(label))
            if whole and not (new and self._is_pair(known)):
                found += known
            for each in new:
                if self._parents(each, label) is None:  # in one of two sides, unknown which
                    spoilt |= set(PAIRED[_pair(str(each.parent))])
        return tuple(name for name in dict.fromkeys(found) if name not in spoilt)

    def has(self, wanted: NewClass, labels: Iterable[str]) -> bool:
        """Whether these source labels hold all of a class to learn."""
        there = frozenset().union(*(spellings(label) for label in labels))
        if wanted.labels:
            return all(spellings(label) & there for label in wanted.labels)
        keys = spellings(wanted.name)
        sides = [{f"{key} {side}" for key in keys} for side in _SIDES]
        return bool(keys & there) or all(side & there for side in sides)

    def require(self, labels: Collection[str], where: str) -> None:
        """Refuse files that hold no label of a class to learn.

        Raises:
            UsageError: names the class, the labels there are, and what may be meant.
        """
        for each in self.new:
            if self.has(each, labels):
                continue
            wanted = " and ".join(repr(label) for label in each.labels or (each.name,))
            near = [n for label in each.labels or (each.name,) for n in nearest(label, labels)]
            hint = f" Did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
            there = listed(sorted(labels), 30) or "none with a name: add labels.json"
            raise UsageError(
                f"No scan in {where} has the label {wanted} of class {each.name!r}.{hint} "
                f"The labels there are: {there}. Say by `labels` what the files call it."
            )

    # --- one label ------------------------------------------------------------------------------

    def _new(self, label: str) -> list[NewClass]:
        keys = spellings(label)
        without_side = {_without_side(key) for key in keys}
        found = []
        for each in self.new:
            if each.labels:
                is_it = any(spellings(own) & keys for own in each.labels)
            else:
                is_it = bool(spellings(each.name) & (keys | without_side))
            if is_it:
                found.append(each)
        return found

    def _known(self, label: str) -> tuple[str, ...]:
        return _known(label, self.old)

    def _parents(self, child: NewClass, label: str) -> tuple[str, ...] | None:
        """The classes around a lesion; None for one of two sides that nothing tells apart."""
        if child.parent is None:
            return ()
        for each in self.new:
            if normalise(each.name) == normalise(child.parent):
                return (each.name,)
        known = self._known(child.parent)
        if not self._is_pair(known):
            return known
        words = {*re.split(r"[^a-z]+", f"{label} {child.name}".lower())}
        sides = [name for name in known if name.rpartition("_")[2] in words]
        return (sides[0],) if len(sides) == 1 else None

    def _is_pair(self, classes: tuple[str, ...]) -> bool:
        return classes in PAIRED.values()

    def _is_part(self, label: str) -> bool:
        return TOTALSEGMENTATOR.get(label, label) != label

    def _parts(self, name: str) -> set[str]:
        return {label for label, whole in TOTALSEGMENTATOR.items() if whole == name != label}


@lru_cache(maxsize=4096)
def _known(label: str, old: tuple[str, ...]) -> tuple[str, ...]:
    """The known class of a source label, if any; both sides where it merges them."""
    if label in old:
        return (label,)
    if label in TOTALSEGMENTATOR:
        name = TOTALSEGMENTATOR[label]
        return (name,) if name in old else ()
    if (pair := _pair(label)) in PAIRED and set(PAIRED[pair]) <= set(old):
        return PAIRED[pair]
    keys = spellings(label)
    for name in old:
        if spellings(name) & keys:
            return (name,)
    try:
        return (resolve(label, old),)
    except UsageError:
        return ()


def _pair(label: str) -> str:
    return label.strip().lower().replace(" ", "_").removesuffix("s")


def nearest(name: str, labels: Collection[str]) -> list[str]:
    """Up to four labels that may be what `name` means."""
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
