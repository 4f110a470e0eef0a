"""Make mlx-lm's cache of keys and values for many short texts."""

from typing import Any

import mlx.nn as nn


def make_cache(model: nn.Module, step: int) -> list[Any]:
    """Return mlx-lm's prompt cache of a model, without tokens.

    mlx-lm's caches make room for 256 positions at a time. For many rows of a few tokens most of
    that is never used.

    Args:
        model: one of mlx-lm's.
        step: positions to make room for at a time, at most; 1 or more.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for layer in cache:
        if getattr(layer, "step", 0) > step:
            layer.step = step
    return cache
