"""Check that this machine has enough memory for a task before it starts."""

import os
from contextlib import suppress
from pathlib import Path

import psutil

from splitquant_mlx.errors import MemoryTooSmallError

SWITCH = "SPLITQUANT_MEMORY_CHECK"
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes() -> int:
    """Return the memory of this machine, or the memory limit of this process's container."""
    total = psutil.virtual_memory().total
    for file in LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            total = min(total, int(Path(file).read_text()))
    return total


def free_bytes() -> int:
    """Return the memory available without swapping."""
    return min(psutil.virtual_memory().available, memory_bytes())


def check_memory(needed_bytes: float, work: str, advice: str = "") -> str:
    """Check that a task fits in this machine's memory.

    Args:
        needed_bytes: estimated memory of the task.
        work: name of the task for messages, such as "chat with PATH".
        advice: what to do if it does not fit.

    Returns:
        A warning when it fits only after other programs are closed; else "".

    Raises:
        MemoryTooSmallError: when it does not fit, unless $SPLITQUANT_MEMORY_CHECK is "off".
    """
    total = memory_bytes()
    needed = f"needs about {needed_bytes / 1e9:.1f} GB of memory"
    if needed_bytes > total:
        if os.environ.get(SWITCH) != "off":
            advice = advice and f": {advice}"
            raise MemoryTooSmallError(
                f"{work} {needed}, this machine has {total / 1e9:.1f} GB{advice} "
                f"(set {SWITCH}=off to try anyway)"
            )
        return f"{work} {needed}, this machine has {total / 1e9:.1f} GB: expect it to fail"
    if needed_bytes > (free := free_bytes()):
        return f"{work} {needed}, {free / 1e9:.1f} GB are free: close other programs"
    return ""
