"""Say where this package keeps the files it fetched."""

import os
import sys
from pathlib import Path


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
