"""Say where this package keeps what it fetched, and keep what took it long to compute."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from splitquant_mlx.runtime.disk import write_atomic

Value = TypeVar("Value")


def cache_directory() -> Path:
    """Return the cache directory, which may not exist yet.

    `$SPLITQUANT_CACHE` wins; else `splitquant-mlx` in `$XDG_CACHE_HOME`, in `~/Library/Caches` on
    macOS, in `~/.cache` elsewhere.
    """
    if chosen := os.environ.get("SPLITQUANT_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "splitquant-mlx"
    caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path.home() / caches / "splitquant-mlx"


def cached_on_disk(
    name: str,
    compute: Callable[[], Value],
    *,
    pack: Callable[[Value], bytes],
    unpack: Callable[[bytes], Value],
) -> Value:
    """Return what was computed before and kept as `name`, else compute and keep it.

    What cannot be unpacked, because a file is damaged or another version's, is computed anew. A
    disk that is full or read-only costs time, not the result.

    Args:
        name: path in the cache directory; it has to tell all that the value depends on.
        compute: called when there is no usable file.
        pack: makes the file's content.
        unpack: undoes it; raises ValueError, TypeError or LookupError for what it cannot use.
    """
    file = cache_directory() / name
    with suppress(OSError, ValueError, TypeError, LookupError):
        return unpack(file.read_bytes())
    value = compute()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, pack(value))
    return value
