"""Make mlx-lm's cache of keys and values for many short texts."""

from typing import Any

import mlx.nn as nn


def make_cache(model: nn.Module, step: int, *, half: bool = False) -> list[Any]:
    """Return mlx-lm's prompt cache of a model, without tokens.

    mlx-lm's caches make room for 256 positions at a time. For many rows of a few tokens most of
    that is never used.

    Args:
        model: one of mlx-lm's.
        step: positions to make room for at a time, at most; 1 or more.
        half: store float32 keys and values as bfloat16, in layers with a plain cache.
    """
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    from splitquant_mlx.models.half_cache import HalfCache

    cache = make_prompt_cache(model)
    if half:
        cache = [HalfCache() if type(layer) is KVCache else layer for layer in cache]
    for layer in cache:
        if getattr(layer, "step", 0) > step:
            layer.step = step
    return cache
