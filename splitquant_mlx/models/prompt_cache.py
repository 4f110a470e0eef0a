"""Make mlx-lm's cache of keys and values for many short texts."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache


class HalfCache(KVCache):
    """mlx-lm's cache of keys and values, which stores float32 ones as bfloat16."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values, and return all of them in the same dtype."""
        if (dtype := keys.dtype) != mx.float32:
            return super().update_and_fetch(keys, values)
        stored = super().update_and_fetch(keys.astype(mx.bfloat16), values.astype(mx.bfloat16))
        return stored[0].astype(dtype), stored[1].astype(dtype)


def make_cache(model: nn.Module, step: int, *, half: bool = False) -> list[Any]:
    """Return mlx-lm's prompt cache of a model, without tokens.

    mlx-lm's caches make room for 256 positions at a time. For many rows of a few tokens most of
    that is never used.

    Args:
        model: one of mlx-lm's.
        step: positions to make room for at a time, at most; 1 or more.
        half: store float32 keys and values as bfloat16, where a layer has a plain cache.
    """
    cache = make_prompt_cache(model)
    if half:
        cache = [HalfCache() if type(layer) is KVCache else layer for layer in cache]
    for layer in cache:
        if getattr(layer, "step", 0) > step:
            layer.step = step
    return cache
