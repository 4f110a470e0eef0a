"""Give mlx a fast matrix product on Linux CPUs.

mlx's Linux wheel is linked to the reference BLAS. OpenBLAS exports the same functions: loaded
first and globally, it answers mlx's calls (measured: 280 against 5 GFLOP/s in float32).
"""

import ctypes
import sys

LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
ADVICE = "install OpenBLAS (Debian, Ubuntu: apt install libopenblas0) for much faster CPU runs"


def preload() -> bool | None:
    """Load OpenBLAS; to be called before the first import of mlx.core in the process.

    Returns:
        True when OpenBLAS is there, False when it is not, None where mlx does not need it.
    """
    if sys.platform != "linux":
        return None
    for library in LIBRARIES:
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False
