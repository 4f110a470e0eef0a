"""Let glibc keep the memory of freed arrays for the next ones.

By default it returns every large block to the kernel at once, which then has to clear the same
pages again for the next array (measured: 40 % of the system time of a conversion on Linux).
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_MMAP_THRESHOLD = 32 << 20
KEPT_BYTES = 256 << 20


def keep_freed_memory() -> None:
    """Set glibc's thresholds for this process; does nothing where there is no glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
