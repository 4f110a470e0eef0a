"""mlx-lm's cache of keys and values in half of the memory."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache


class HalfCache(KVCache):
    """Cache of keys and values that stores float32 ones as bfloat16."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values, and return all of them in the same dtype."""
        dtype = keys.dtype
        if dtype == mx.float32:
            keys, values = keys.astype(mx.bfloat16), values.astype(mx.bfloat16)
        stored: Any = super().update_and_fetch(keys, values)
        return stored[0].astype(dtype), stored[1].astype(dtype)
