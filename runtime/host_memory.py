"""What the C library does with memory that tensors in host memory give back.

By default glibc returns large blocks to the system at once, and the next tensor of that size pays for
its pages again, which the system clears one by one: in training steps of small models with a large
vocabulary that is a third of the time. Ranks use the same sizes again and again, so they keep them.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BLOCK_BYTES = 1 << 28
"""Smaller blocks stay with the process; larger ones, such as whole models, go back to the system."""
KEPT_FREE_BYTES = 1 << 30
"""Free memory at the end of the heap beyond this goes back as well."""


def keep_freed_memory() -> None:
    """Has this process keep freed memory for its next tensors. Does nothing without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
    library.mallopt(_M_TRIM_THRESHOLD, KEPT_FREE_BYTES)
