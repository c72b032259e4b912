"""Rules for single cases that a dataset's description names: `rule: ct_up_to_id_500`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from foundation.data.cases import Case
from foundation.data.dataset import Dataset, Rule

EIGHT_ORGANS = (
    "spleen",
    "kidney_left",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "pancreas",
    "duodenum",
)


def eight_organs_from_case_60(case: Case, dataset: Dataset) -> Case:
    """Leave 8 of BTCV's 14 organs annotated from case 60 on; the others are unknown there.

    Args:
        case: As its layout found it.
        dataset: That it belongs to.

    Returns:
        The case as it is used.
    """
    if int(case.id) < 60:
        return case
    return replace(case, annotated=tuple(n for n in dataset.annotated if n in EIGHT_ORGANS))


def ct_up_to_id_500(case: Case, _: Dataset) -> Case | str:
    """Leave out the MR scans of AMOS22, whose ids are above 500.

    Args:
        case: As its layout found it.

    Returns:
        The case, or why it is left out.
    """
    is_ct = int(case.id.rpartition("_")[2]) <= 500
    return case if is_ct else "an MR scan (ids above 500 are), not CT."


def annotated_where_masks_are(case: Case, dataset: Dataset) -> Case:
    """Annotate a class only where all of its structures have a mask; else it is unknown.

    Args:
        case: As its layout found it.
        dataset: That it belongs to.

    Returns:
        The case as it is used.
    """
    lost = {name for key in dataset.without_mask(case) for name in dataset.label_map[key]}
    return replace(
        case,
        labels=tuple(s.path for s in case.structures if dataset.key_of(s.label) is not None),
        annotated=tuple(name for name in case.annotated if name not in lost),
    )


HOOKS: Mapping[str, Rule] = {
    hook.__name__: hook
    for hook in (eight_organs_from_case_60, ct_up_to_id_500, annotated_where_masks_are)
}
