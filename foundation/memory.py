"""How the allocator of the C library treats large blocks: half of a training step hangs on it."""

from __future__ import annotations

import ctypes

# Numbers of mallopt's parameters in glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory(spare_bytes: int = 1 << 28) -> bool:
    """Keep what is freed for the next allocation; returns whether the C library can.

    By default glibc takes every large tensor fresh from the system and gives it back, and the
    system clears its pages each time. A network that allocates the same tensors in every step
    then spends its time on page faults. The whole process is affected, and holds on to the most
    that it ever needed. spare_bytes: what the heap grows by. Only glibc, hence Linux.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, spare_bytes))
    return all([mallopt(name, value) == 1 for name, value in settings])
