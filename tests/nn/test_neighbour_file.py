"""A layer of lookup tables computes what its weight does, and so does the kernel's source."""

import ctypes
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from splitquant_mlx import LUTLinear
from splitquant_mlx.nn import neighbour_file
from splitquant_mlx.nn.neighbour_file import MixedLinear

# the kernel's body as C++, lane after lane: the last one adds up, and writes
SHIM = """
#include <cstddef>
#include <cstdint>
#define DEVICE
#define LANES 32
#define SUM(value) (total = lane ? total + (value) : (value))
using T = float;
extern "C" void run(const T* x, const uint32_t* weight, const T* codebook, const T* outliers,
                    const uint16_t* indices, T* y, int IN, int OUT, int BITS, int OUTLIERS,
                    int row, int token, int lane) {
    static float total;
    BODY
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Return the kernel compiled for the CPU, to be called as mlx's kernels are.

    Skips where there is no compiler.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    directory = tmp_path_factory.mktemp("kernel")
    (directory / "lut.cpp").write_text(SHIM.replace("BODY", neighbour_file.BODY))
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", "lut.so"]
    subprocess.run([*command, "lut.cpp"], cwd=directory, check=True)
    run = ctypes.CDLL(str(directory / "lut.so")).run
    calls = []

    def call(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        assert output_dtypes == [mx.float32] and grid[0] % 32 == 0 == threadgroup[0] % 32
        sizes = [dict(template)[name] for name in ("IN", "OUT", "BITS", "OUTLIERS")]
        arrays = [np.ascontiguousarray(np.array(array)) for array in inputs]
        y = np.full(output_shapes[0], np.nan, np.float32)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (*arrays, y)]
        for token in range(grid[1]):
            for thread in range(grid[0] + 32):  # threads of no row, too
                run(*pointers, *sizes, thread // 32, token, thread % 32)
        calls.append(grid)
        return [mx.array(y)]

    call.calls = calls
    return call


def random_layer(inputs, outputs, bits, outliers, bias=True):
    rng = np.random.default_rng(inputs + bits)
    layer = LUTLinear(inputs, outputs, bias, bits=bits, outliers=outliers)
    layer.weight = mx.array(rng.integers(0, 2**32, layer.weight.shape, np.uint32))
    if outliers:
        picked = [rng.permutation(inputs)[:outliers] for _ in range(outputs)]
        layer.indices = mx.array(np.array(picked).astype(np.uint16))
    for leaf in ("codebook", *(["outliers"] if outliers else []), *(["bias"] if bias else [])):
        layer[leaf] = mx.array(rng.standard_normal(layer[leaf].shape).astype(np.float32))
    return layer


def numpy_weight(layer, inputs):
    """Look the codes up bit by bit."""
    words, codebook = np.array(layer.weight), np.array(layer.codebook)
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(len(words), inputs, layer.bits) @ (1 << np.arange(layer.bits))
    w = np.take_along_axis(codebook, codes, axis=1).astype(np.float64)
    if "outliers" in layer:
        for row, (places, values) in enumerate(zip(layer.indices, layer.outliers, strict=True)):
            w[row, np.array(places)] += np.array(values)
    return w


@pytest.mark.parametrize(("outliers", "outputs"), [(0, 7), (3, 1), (32, 5)])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("inputs", [32, 96, 288])
def test_kernel_and_operations_compute_the_product(
    kernel, monkeypatch, inputs, outputs, bits, outliers
):
    layer = random_layer(inputs, outputs, bits, outliers, bias=outliers == 0)
    w = numpy_weight(layer, inputs)
    x = mx.random.normal((2, 3, inputs), key=mx.random.key(bits))
    wanted = np.array(x, np.float64) @ w.T + (np.array(layer.bias) if "bias" in layer else 0)
    np.testing.assert_array_equal(np.array(layer.dense()), w.astype(np.float32))
    np.testing.assert_allclose(np.array(layer(x)), wanted, rtol=0, atol=1e-5 * abs(wanted).max())
    calls = len(kernel.calls)
    monkeypatch.setattr(neighbour_file, "_kernel", lambda: kernel)
    np.testing.assert_allclose(np.array(layer(x)), wanted, rtol=0, atol=1e-5 * abs(wanted).max())
    assert len(kernel.calls) == calls + 1
    assert layer(mx.ones((9, inputs))).shape == (9, outputs) and len(kernel.calls) == calls + 1
    assert f"bits={bits}, outliers={outliers}" in repr(layer) and f"dims={inputs}" in repr(layer)


def test_output_has_the_dtype_of_the_input():
    layer = random_layer(64, 8, 3, 1)
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        layer.set_dtype(dtype)
        assert layer(mx.ones((2, 64), dtype)).dtype == dtype


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_mixed_bits_compute_the_product(bits, group_size):
    rng = np.random.default_rng(bits)
    w = mx.array(rng.standard_normal((24, 5 * group_size)).astype(np.float32))
    widths = rng.permutation(np.repeat([bits - 1, bits, bits, bits, bits + 1], group_size))
    places = [np.flatnonzero(widths == width) for width in sorted(set(widths))]
    found, dense = [], np.empty(w.shape, np.float32)
    for width, own in zip(sorted(set(widths)), places, strict=True):
        settings = {"bits": int(width), "group_size": group_size}
        quantized = mx.quantize(w[:, mx.array(own)], **settings)
        dense[:, own] = np.array(mx.dequantize(*quantized, **settings))
        found.append([array.reshape(-1) for array in quantized])
    layer = MixedLinear(5 * group_size, 24, bits=bits, group_size=group_size)
    stored = dict(
        zip(
            ("weight", "scales", "biases"),
            map(mx.concatenate, zip(*found, strict=True)),
            strict=True,
        )
    )
    stored |= {"widths": mx.array(widths, mx.uint8), "bias": mx.random.normal((24,))}
    assert {k: v.shape for k, v in stored.items()} == {
        k: v.shape for k, v in layer.parameters().items()
    }
    layer.update(stored)
    np.testing.assert_array_equal(np.array(layer.dense()), dense)
    for shape in ((5 * group_size,), (1, 5 * group_size), (2, 9, 5 * group_size)):
        x = mx.random.normal(shape)
        wanted = np.array(x, np.float64) @ dense.T + np.array(stored["bias"])
        np.testing.assert_allclose(
            np.array(layer(x)), wanted, rtol=0, atol=1e-5 * abs(wanted).max()
        )
    for dtype in (mx.float16, mx.bfloat16):
        layer.set_dtype(dtype)
        assert layer(mx.ones((2, 5 * group_size), dtype)).dtype == dtype
