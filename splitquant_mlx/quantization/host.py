"""View mlx arrays as numpy arrays."""

import mlx.core as mx
import numpy as np


def host_values(w: mx.array) -> np.ndarray:
    """Return `w` without a copy; bfloat16, which numpy lacks, as uint16 bit patterns."""
    return np.array(w.view(mx.uint16) if w.dtype == mx.bfloat16 else w, copy=False)


def as_float32(values: np.ndarray) -> np.ndarray:
    """Return `host_values` as float32; uint16 are bfloat16 bit patterns, its high half."""
    if values.dtype == np.uint16:
        return np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
    return values.astype(np.float32, copy=False)
