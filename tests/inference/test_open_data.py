"""The embedded model on the open CTs: no doubt about the body of a scan that is intact."""

from __future__ import annotations

from pathlib import Path

import pytest

from foundation import from_pretrained


@pytest.mark.slow
def test_no_intact_ct_is_doubted(open_data: Path) -> None:
    found = sorted(open_data.glob("*/ct.nii.gz")) + sorted(open_data.glob("*crops/*.nii.gz"))
    if not found:
        pytest.skip(f"no CT in {open_data}")
    model = from_pretrained("universal-ct")
    doubted = {str(ct): model.segment(ct, progress=False).doubts for ct in found}
    assert not any(doubted.values()), doubted
