"""The options of segmenting that callers pass on. `segment_volume` has the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch

    from foundation.imaging.result import Layout


class InferenceOptions(TypedDict, total=False):
    """How a CT is segmented; see `segment_volume`."""

    device: str | torch.device | None
    overlap: float | None
    postprocess: bool
    progress: bool


class FolderOptions(InferenceOptions, total=False):
    """How many CTs are segmented and saved; see `segment_volume` and `Segmentation.save`."""

    classes: str | Sequence[str] | None
    layout: Layout
    preview: bool
