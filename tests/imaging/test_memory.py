"""What is free: the machine's memory, or less where a container or a batch job has a limit."""

from pathlib import Path

import pytest

from foundation.errors import VolumeError
from foundation.imaging import memory

GIB = 1 << 30
MEMINFO = (
    "MemTotal:  16777216 kB\nMemFree: 1000 kB\nMemAvailable:  8388608 kB\nSwapFree:  1048576 kB\n"
)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux with 8 GiB available and 1 GiB of swap, whose files a test may change."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    (proc / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(memory, "_PROC", proc)
    monkeypatch.setattr(memory, "_CGROUP", groups)
    return tmp_path


def test_without_a_limit_the_machine_counts(system: Path) -> None:
    assert memory.available_bytes() == 9 * GIB


def test_a_group_counts_less_what_it_uses_and_without_files_that_can_go(system: Path) -> None:
    (system / "proc" / "self" / "cgroup").write_text("0::/job/step\n")
    step = system / "cgroup" / "job" / "step"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    (step / "memory.current").write_text("1\n")
    assert memory.available_bytes() == 9 * GIB
    job = step.parent
    (job / "memory.max").write_text(f"{4 * GIB}\n")
    (job / "memory.current").write_text(f"{3 * GIB}\n")
    (job / "memory.stat").write_text(f"anon {2 * GIB}\ninactive_file {GIB}\n")
    assert memory.available_bytes() == 2 * GIB


def test_groups_of_the_first_version_count_too(system: Path) -> None:
    group = system / "cgroup" / "memory"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(f"{4 * GIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{3 * GIB}\n")
    assert memory.available_bytes() == GIB


def test_where_nothing_is_told_nothing_is_refused(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (system / "proc" / "meminfo").unlink()
    monkeypatch.delattr("os.sysconf", raising=False)
    assert memory.available_bytes() is None
    memory.require_memory(1 << 60, "All")


def test_what_needs_more_is_refused_with_both_numbers(system: Path) -> None:
    memory.require_memory(9 * GIB, "A CT")
    with pytest.raises(VolumeError, match=r"A CT needs about 12\.9 GB .* 9\.66 GB are free"):
        memory.require_memory(12 * GIB, "A CT")
