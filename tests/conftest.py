"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def open_data() -> Path:
    """The folder of open CTs, or a skip: the core of the suite never needs it."""
    folder = Path(os.environ.get("UNIVERSAL_CT_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"open CT data not found at {folder}; set UNIVERSAL_CT_DATA to its folder")
    return folder
