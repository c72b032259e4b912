"""A case is made by one process at a time, whatever becomes of the others."""

import subprocess
import sys
from pathlib import Path

import pytest

from foundation.inference import claims
from foundation.inference.claims import claimed


@pytest.fixture(params=["locks", "no locks"], autouse=True)
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no locks":
        monkeypatch.setattr(claims, "fcntl", None)
    return str(request.param)


def test_one_has_it_and_the_other_does_not(tmp_path: Path) -> None:
    path = tmp_path / "new" / "claim"
    for _ in range(2):
        with claimed(path) as first, claimed(path) as second:
            assert first is None
            assert second and "Another process has it in work" in second
            with claimed(path.with_name("other")) as other:
                assert other is None
        assert list(tmp_path.iterdir()) == [], "nothing is left, no folder either"


def test_it_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "claim"):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_results_stays(tmp_path: Path) -> None:
    with claimed(tmp_path / "new" / "claim"):
        (tmp_path / "new" / "result").write_text("")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result"]


def test_what_a_killed_process_had_claimed(tmp_path: Path, file_system: str) -> None:
    path = tmp_path / "claim"
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from foundation.inference import claims\n"
        f"if {file_system!r} == 'no locks': claims.fcntl = None\n"
        "with claims.claimed(Path(sys.argv[1])) as taken:\n"
        "    assert taken is None\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -9
    assert path.exists()
    with claimed(path) as taken:
        if file_system == "locks":
            assert taken is None, "the system has freed it"
        else:
            assert taken and f"remove {path}ed" in taken, "nobody can know: it says what to do"
    if file_system == "locks":
        assert not path.exists()
