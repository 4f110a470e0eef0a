"""Speed up matrix products and memory allocation of mlx on Linux CPUs.

mlx's Linux wheel is linked to the reference BLAS. OpenBLAS exports the same symbols: loaded first
and globally, it serves mlx's calls (280 instead of 5 GFLOP/s in float32). By default its threads
spin between products for longer than mlx takes from one to the next, which uses a third of the CPU
time of a calibration without making it faster.

On a CPU mlx allocates each array with malloc. By default glibc returns large blocks to the system
at once, and the kernel clears the pages of the next one: a seventh of the CPU time of sampling.
"""

import ctypes
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

SPIN = "16"  # OpenBLAS threads spin for 2^16 cycles before they sleep
LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
MMAP_THRESHOLD_BYTES = 1 << 27  # larger arrays are returned to the system when freed
ADVICE = "install OpenBLAS (Debian, Ubuntu: apt install libopenblas0) for much faster CPU runs"


@cache
def preload() -> bool | None:
    """Load OpenBLAS once, before the first import of mlx.core in the process.

    The OpenBLAS of the system takes precedence over that of the package ngsolve-openblas.

    Returns:
        True when OpenBLAS is loaded, False when there is none, None where mlx does not need it.
    """
    if sys.platform != "linux":
        return None
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", SPIN)
    _retain_freed_memory()
    _preload_torch()
    for load in (*(partial(_load, library) for library in LIBRARIES), _load_from_wheel):
        with suppress(OSError):
            load()
            return True
    return False


def _retain_freed_memory() -> None:
    """Have glibc's malloc retain freed memory in one arena that all threads allocate from."""
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(M_ARENA_MAX, 1)


def release_freed_memory() -> None:
    """Return to the system what glibc's malloc retained; before large arrays are allocated."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _preload_torch() -> None:
    """Load libtorch, if installed, before OpenBLAS.

    Both export some symbols, such as batched products, with different signatures. Loaded after
    OpenBLAS, torch would call those of OpenBLAS and crash.
    """
    for file in _package_files("torch", "lib/libtorch_cpu.so"):
        with suppress(OSError):
            ctypes.CDLL(str(file))


def _load(library: str) -> None:
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def _load_from_wheel() -> None:
    """Load ngsolve-openblas with the Fortran runtime of mlx's wheel.

    The library needs "libgfortran.so.5" and searches its own directory first; mlx's copy has
    another name. While loading, a temporary directory holds links to both.
    """
    openblas = next(_package_files("ngsolve_openblas", "libopenblas*.so"), None)
    fortran = next(_package_files("mlx", "../mlx_cpu.libs/libgfortran-*.so.5*"), None)
    if openblas is None or fortran is None:
        raise FileNotFoundError("ngsolve-openblas is not installed")
    ctypes.CDLL(str(fortran))
    with tempfile.TemporaryDirectory() as links:
        os.symlink(fortran, f"{links}/libgfortran.so.5")
        os.symlink(openblas, f"{links}/{openblas.name}")
        _load(f"{links}/{openblas.name}")


def _package_files(package: str, pattern: str) -> Iterator[Path]:
    """Yield files of a package without importing it; none if it is not installed."""
    spec = importlib.util.find_spec(package)
    for home in spec.submodule_search_locations or () if spec else ():
        yield from Path(home).glob(pattern)


@contextmanager
def one_thread(*, numpy_only: bool = False) -> Iterator[None]:
    """Limit OpenBLAS to the calling thread.

    With one calling thread per core, threads of OpenBLAS would compete for the cores and spin
    while they wait. Has no effect on other BLAS libraries.

    Args:
        numpy_only: limit only the OpenBLAS bundled with numpy, not the one that mlx calls.
    """
    from threadpoolctl import ThreadpoolController

    selection = {"prefix": "libscipy_openblas"} if numpy_only else {"internal_api": "openblas"}
    with ThreadpoolController().select(**selection).limit(limits=1):
        yield
