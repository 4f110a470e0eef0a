"""pip install provides OpenBLAS, mlx's products use it, and freed memory is reused."""

import platform
import subprocess
import sys

import pytest

PRODUCT = """
from splitquant_mlx.runtime import blas
blas.LIBRARIES = ()  # a system without OpenBLAS
from splitquant_mlx import Recipe
assert blas.preload() is True
import mlx.core as mx
mx.set_default_device(mx.cpu)
assert (mx.ones((64, 32)) @ mx.ones((32, 16)) == 32).all()
print(open("/proc/self/maps").read())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the wheel is for x86-64"
)
def test_openblas_comes_with_the_package():
    done = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ngsolve_openblas/libopenblas" in done.stdout


def test_a_missing_openblas_is_reported(monkeypatch):
    from splitquant_mlx.runtime import blas

    monkeypatch.setattr(blas, "LIBRARIES", ())
    monkeypatch.setattr(blas, "_package_files", lambda package, pattern: iter(()))
    assert blas.preload.__wrapped__() is (False if sys.platform == "linux" else None)


IDLE = """
import time
from splitquant_mlx.runtime import blas
blas.preload()
import mlx.core as mx
mx.set_default_device(mx.cpu)
x = mx.ones((256, 256))
mx.eval(x @ x)
before = time.process_time()
for _ in range(40):
    mx.eval(x @ x)
    time.sleep(0.02)
print(time.process_time() - before)
"""


def test_threads_of_openblas_sleep_between_products():
    """By default they spin during the 20 ms between products."""
    done = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True)
    assert float(done.stdout) < 0.6, done.stderr  # 0.3; 0.8 by default


MEMORY = """
import resource
from splitquant_mlx.runtime import blas
blas.preload()
import mlx.core as mx
mx.set_default_device(mx.cpu)
pages = (1 << 26) // resource.getpagesize()
for _ in range(10):
    mx.eval(mx.ones(1 << 24))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    mx.eval(mx.ones(1 << 24))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (10 * pages))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_the_memory_of_freed_arrays_is_reused():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert float(done.stdout) < 0.1, done.stderr


@pytest.mark.slow  # few environments have torch
def test_torch_does_not_call_openblas():
    """Both export some symbols with different signatures, and torch crashed."""
    pytest.importorskip("torch", reason='pip install ".[parity]"')
    batches = "from splitquant_mlx import load; import torch; x = torch.ones(4, 48, 16)"
    check = f"{batches}; assert (x @ x.mT == 16).all()"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
