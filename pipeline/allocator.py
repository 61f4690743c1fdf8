"""What a process that computes asks of its C library's allocator: of glibc alone, others are left as they are."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8  # M_... of glibc's malloc.h


def share_one_arena() -> None:
    """For threads that compute: glibc gives each an arena of its own, which cannot hold a block of 64 MiB. Larger ones,
    such as BiT's first activations, are fetched from the kernel and returned each time, a sixth of a whole job. Only
    threads that begin later are concerned, so call it before any does."""
    _mallopt((_ARENA_MAX, 1))


def keep_freed_memory() -> None:
    """Large blocks are reused instead of returned: page faults of fresh ones cost up to a third of a forward pass
    (research: models, 4.3). The process keeps its peak."""
    _mallopt((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 64 << 20))


def _mallopt(*settings: tuple[int, int]) -> None:
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for name, value in settings:
            mallopt(name, value)
