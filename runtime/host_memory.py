"""What the C library does with memory that tensors in host memory give back.

By default glibc returns large blocks to the system at once, and the next tensor of that size pays for
its pages again, which the system clears one by one: in training steps of small models with a large
vocabulary that is a third of the time. Ranks use the same sizes again and again, so they keep them.

Threads but the main one have arenas of their own, whose heaps go back whole whatever these limits are:
gloo's threads take their scratch memory there, and paid for its pages in every reduction. So all threads
share one arena. glibc decides on that once, when a second thread first needs memory. Not where there are
GPUs: nothing is reduced on such hosts, and on many cores threads that tokenize would wait for each other.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
KEPT_BLOCK_BYTES = 1 << 28
"""Smaller blocks stay with the process; larger ones, such as whole models, go back to the system."""
KEPT_FREE_BYTES = 1 << 30
"""Free memory at the end of the heap beyond this goes back as well."""
NVIDIA = Path("/dev/nvidiactl")
"""There where a driver has GPUs."""


def keep_freed_memory() -> None:
    """Has this process, and those forked from it, keep freed memory for next tensors.

    Best called before there are threads, so before numpy or torch is imported. Does nothing without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
    library.mallopt(_M_TRIM_THRESHOLD, KEPT_FREE_BYTES)
    if not NVIDIA.exists():
        library.mallopt(_M_ARENA_MAX, 1)


def arena_environment() -> Mapping[str, str]:
    """The same arenas for a process that has threads before it can ask, because it imports torch first."""
    return {} if NVIDIA.exists() else {"MALLOC_ARENA_MAX": "1"}
