"""Compare the memory that a work needs with the memory of this machine, before the work."""

import os
from contextlib import suppress
from pathlib import Path

import psutil

from splitquant_mlx.errors import MemoryTooSmallError

SWITCH = "SPLITQUANT_MEMORY_CHECK"
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes() -> int:
    """Return the memory of this machine, or of the container that this process runs in."""
    total = psutil.virtual_memory().total
    for file in LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            total = min(total, int(Path(file).read_text()))
    return total


def free_bytes() -> int:
    """Return the memory that can be used without swapping."""
    return min(psutil.virtual_memory().available, memory_bytes())


def check_memory(needed_bytes: float, work: str, advice: str = "") -> str:
    """Refuse a work that this machine's memory is too small for.

    Args:
        needed_bytes: by an estimate.
        work: for the message, such as "chat with PATH".
        advice: what would fit.

    Returns:
        A warning where it fits only when other programs make room; else "".

    Raises:
        MemoryTooSmallError: unless $SPLITQUANT_MEMORY_CHECK is "off".
    """
    there = memory_bytes()
    needed = f"needs about {needed_bytes / 1e9:.1f} GB of memory"
    if needed_bytes > there:
        if os.environ.get(SWITCH) != "off":
            advice = advice and f": {advice}"
            raise MemoryTooSmallError(
                f"{work} {needed}, this machine has {there / 1e9:.1f} GB{advice} "
                f"({SWITCH}=off tries it all the same)"
            )
        return f"{work} {needed}, this machine has {there / 1e9:.1f} GB: expect it to fail"
    if needed_bytes > (free := free_bytes()):
        return f"{work} {needed}, {free / 1e9:.1f} GB are free: close other programs"
    return ""
