"""View mlx arrays as numpy arrays."""

import mlx.core as mx
import numpy as np


def host_values(w: mx.array) -> np.ndarray:
    """Return `w` without a copy; bfloat16, which numpy lacks, as uint16 bit patterns."""
    return np.array(w.view(mx.uint16) if w.dtype == mx.bfloat16 else w, copy=False)
