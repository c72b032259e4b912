"""What a label value stands for: names of the source into classes, lesions into their organs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from foundation.taxonomy import CLASSES, PAIRED, organ_around

# The organ that holds a lesion; a hepatic vessel is in the liver too.
PARENTS = {c.name: c.parent for c in CLASSES if c.parent} | {"hepatic_vessel": "liver"}


@dataclass(frozen=True)
class Value:
    """What one label value stands for.

    Attributes:
        tissues: Names of what is there, the most specific first.
        classes: The annotated classes of such a voxel.
        undecided: Pairs whose side is not known yet.
        unknown: Of no known class, and it may be of any.
    """

    tissues: tuple[str, ...] = ()
    classes: frozenset[str] = frozenset()
    undecided: frozenset[str] = frozenset()
    unknown: bool = False


def meaning(
    sources: Sequence[str],
    names: Mapping[str, tuple[str, ...]],
    annotated: Collection[str],
    marked: Collection[str] = (),
) -> Value:
    """Find out what a voxel with these source labels is.

    Args:
        sources: The source labels of the voxel.
        names: Source label → classes; two sides of a pair are a label that merges them.
        annotated: The classes that the case annotates; all others are left out.
        marked: Source labels whose voxels may be anything.

    Returns:
        What its value stands for.
    """
    wanted = set(annotated)
    classes: set[str] = set()
    undecided: set[str] = set()
    tissues: dict[str, bool] = {}  # name → whether it is a part of another structure
    for source in sources:
        found = names.get(source, ())
        pair = next((pair for pair, both in PAIRED.items() if found == both), None)
        tissues.setdefault(_tissue(source, found, pair), any(name in PARENTS for name in found))
        if pair is not None:
            undecided.add(pair)
            continue
        for name in found:
            classes.add(name)
            if (parent := PARENTS.get(name)) is not None:
                organ = organ_around(parent, source)  # a cyst of the left kidney
                (undecided if organ is None else classes).add(organ or parent)
    classes &= wanted
    undecided = {
        pair for pair in undecided if wanted & set(PAIRED[pair]) and not classes & set(PAIRED[pair])
    }
    known = bool(classes or undecided)
    return Value(
        tissues=tuple(sorted(tissues, key=lambda name: not tissues[name])),
        classes=frozenset(classes),
        undecided=frozenset(undecided),
        unknown=not known and not set(sources).isdisjoint(marked),
    )


def _tissue(source: str, found: Sequence[str], pair: str | None) -> str:
    """The source's own name; a class where that is but a number, or a pair yet to be split."""
    if pair is not None:
        return pair
    if not found or re.search("[a-zA-Z]", source):
        return source
    return next((name for name in found if name in PARENTS), found[0])
