"""The allocator: freed memory is used again instead of being asked for anew."""

import platform
import subprocess
import sys

import pytest

from foundation.hardware import keep_freed_memory

_SCRIPT = """
import resource, sys
import numpy as np
from foundation.hardware import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(4_000_000)
before = faults()
for _ in range(10):
    np.ones(4_000_000)  # 32 MB, above any threshold of mmap
print(faults() - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_large_blocks_are_used_again() -> None:
    assert page_faults("keep") < 0.2 * page_faults("default")


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert keep_freed_memory() is False
