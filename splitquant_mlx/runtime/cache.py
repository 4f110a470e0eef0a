"""Cache of downloads and of expensive results on disk."""

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

    `$SPLITQUANT_CACHE` if set; else `splitquant-mlx` in `$XDG_CACHE_HOME`, in `~/Library/Caches` on
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
    """Return a value from the cache, or compute and cache it.

    A file that is damaged or of another version is replaced. If the disk is full or read-only, the
    value is returned without being cached.

    Args:
        name: path in the cache directory; must identify everything that the value depends on.
        compute: computes the value if there is no usable file.
        pack: serializes the value.
        unpack: deserializes it; raises ValueError, TypeError or LookupError for unusable content.
    """
    file = cache_directory() / name
    with suppress(OSError, ValueError, TypeError, LookupError):
        return unpack(file.read_bytes())
    value = compute()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, pack(value))
    return value
