"""Freed memory stays with the process while a network computes on the CPU.

glibc hands every large freed block back to the kernel and asks for it again at the next layer; each page is then zeroed
and mapped anew. A training step of the small denoiser takes 500,000 such page faults, a quarter of its time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
# What glibc starts with, and what its thresholds rise to by themselves in a program with large blocks.
DEFAULT_MMAP_MAX, LARGEST_MMAP_THRESHOLD = 65536, 32 << 20


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within the block, freed memory is kept for the next layer; at its end it goes back to the kernel.

    Peak memory is that of the computation. Without ``mallopt`` in the C library (macOS, Windows, musl) nothing changes.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        library.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
        library.malloc_trim(0)
