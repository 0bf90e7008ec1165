"""The C allocator on a CPU."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
GIB = 1 << 30
CHOSEN_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors free, for the next ones; whether that could be had.

    glibc gives large blocks back to the system at once and gets others filled with zeros, page by page: a fifth of a
    training step of SmolLM2-135M (bench/results/cpu/freed-memory.txt). Nothing is done where the environment has
    settings of its own, or another allocator.
    """
    if any(name in os.environ for name in CHOSEN_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    # Older versions of glibc take 32 MiB at most.
    kept = mallopt(M_MMAP_THRESHOLD, GIB) or mallopt(M_MMAP_THRESHOLD, 1 << 25)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, -1))
