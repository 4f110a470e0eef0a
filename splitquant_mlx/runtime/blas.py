"""Give mlx a fast matrix product and fast memory on Linux CPUs.

mlx's Linux wheel is linked to the reference BLAS. OpenBLAS exports the same functions: loaded
first and globally, it answers mlx's calls (measured: 280 against 5 GFLOP/s in float32). Its threads
wait for the next product by keeping their cores busy, by default for longer than mlx takes from one
to the next: in a calibration that is a third of the processor time, and no second of it is won.

On a CPU mlx takes the memory of each array from malloc, which by default returns large arrays to
the system at once and has the next one's pages cleared again: a seventh of the processor time of
sampling.
"""

import ctypes
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

WAIT = "16"  # threads of OpenBLAS wait 2^16 cycles before they sleep
LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
KEPT_BYTES = 1 << 27  # of an array, at most, that is not returned to the system when it is freed
ADVICE = "install OpenBLAS (Debian, Ubuntu: apt install libopenblas0) for much faster CPU runs"


@cache
def preload() -> bool | None:
    """Load OpenBLAS, once; too late after the first import of mlx.core in the process.

    A system's own OpenBLAS comes first, then the one of the package ngsolve-openblas.

    Returns:
        True when OpenBLAS is loaded, False when there is none, None where mlx does not need it.
    """
    if sys.platform != "linux":
        return None
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", WAIT)
    _keep_freed_memory()
    _bind_torch()
    for load in (*map(_loader, LIBRARIES), _load_from_wheel):
        try:
            load()
        except OSError:
            continue
        return True
    return False


def _keep_freed_memory() -> None:
    """Let malloc keep what is freed for the next array of any thread, where it is glibc's."""
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(M_ARENA_MAX, 1)


def _bind_torch() -> None:
    """Load torch's library where there is one, so that it calls its own functions.

    It has some that OpenBLAS has under the same names with other arguments, products of batches
    among them: loaded later, it would call those of OpenBLAS, and crash.
    """
    for file in _package_files("torch", "lib/libtorch_cpu.so"):
        with suppress(OSError):
            ctypes.CDLL(str(file))


def _loader(library: str | Path) -> Callable[[], object]:
    return lambda: ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _load_from_wheel() -> None:
    """Load ngsolve-openblas with the Fortran runtime that mlx's wheel brings.

    The library asks for "libgfortran.so.5" and looks in its own directory first; mlx's copy has
    another name. Both are linked into one directory for the time of loading.
    """
    openblas = next(_package_files("ngsolve_openblas", "libopenblas*.so"), None)
    fortran = next(_package_files("mlx", "../mlx_cpu.libs/libgfortran-*.so.5*"), None)
    if openblas is None or fortran is None:
        raise FileNotFoundError("no wheel of OpenBLAS")
    ctypes.CDLL(str(fortran))
    with tempfile.TemporaryDirectory() as links:
        os.symlink(fortran, f"{links}/libgfortran.so.5")
        os.symlink(openblas, f"{links}/{openblas.name}")
        _loader(f"{links}/{openblas.name}")()


def _package_files(package: str, pattern: str) -> Iterator[Path]:
    """Yield files of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    for home in spec.submodule_search_locations or () if spec else ():
        yield from Path(home).glob(pattern)


@contextmanager
def one_thread(*, numpy_only: bool = False) -> Iterator[None]:
    """Let OpenBLAS compute in the threads that call it, and in no others.

    Where they are as many as cores already, its threads take turns with them, and keep a core busy
    while they wait. Does nothing where there is another BLAS.

    Args:
        numpy_only: numpy's own OpenBLAS alone, not the one that mlx calls.
    """
    from threadpoolctl import ThreadpoolController

    which = {"prefix": "libscipy_openblas"} if numpy_only else {"internal_api": "openblas"}
    with ThreadpoolController().select(**which).limit(limits=1):
        yield
