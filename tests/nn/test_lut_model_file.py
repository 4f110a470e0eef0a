"""Lookup-table and mixed-bit layers compute the product; the GPU kernel is tested as C++."""

import ctypes
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from splitquant_mlx import LUTLinear
from splitquant_mlx.nn import lut_model_file
from splitquant_mlx.nn.lut_model_file import MixedLinear
from splitquant_mlx.quantization.affine import pack

# The kernel's source as C++. Each lane runs up to the next unknown exchange between the lanes of a
# row; then all lanes restart, with the values exchanged so far.
SHIM = """
#include <cstddef>
#include <cstdint>
#define device
#define __device__
struct Place { int x, y; };
struct Stop {};
static Place thread_position_in_grid, blockIdx, blockDim, threadIdx;
static float exchanges[8][32];
static int this_lane, known, made;
static float exchanged(float value, int step) {  // value of lane ^ step; 0: sum over lanes
    int now = made++;
    if (now == known) {
        exchanges[now][this_lane] = value;
        throw Stop();
    }
    float result = step ? exchanges[now][this_lane ^ step] : 0;
    for (int i = 0; !step && i < 32; i++) result += exchanges[now][i];
    return result;
}
namespace metal { [[maybe_unused]] static float simd_sum(float v) { return exchanged(v, 0); } }
[[maybe_unused]] static float __shfl_xor_sync(unsigned, float v, int step) {
    return exchanged(v, step);
}
HEADER
static void kernel(const T* x, const uint32_t* weight, const T* codebook, const T* outliers,
                   const uint16_t* indices, T* y, int IN, int OUT, int BITS, int OUTLIERS) {
    SOURCE
}
extern "C" void run(const T* x, const uint32_t* weight, const T* codebook, const T* outliers,
                    const uint16_t* indices, T* y, int IN, int OUT, int BITS, int OUTLIERS,
                    int threads, int tokens, int block) {
    for (int first = 0; first < threads * tokens; first += 32) {
        bool stopped = true;
        for (known = 0; stopped; known++) {
            stopped = false;
            for (this_lane = 0; this_lane < 32; this_lane++) {
                int place = first % threads + this_lane, token = first / threads;
                thread_position_in_grid = {place, token}, blockDim = {block, 1};
                blockIdx = {place / block, token}, threadIdx = {place % block, 0}, made = 0;
                try {
                    kernel(x, weight, codebook, outliers, indices, y, IN, OUT, BITS, OUTLIERS);
                } catch (Stop) {
                    stopped = true;
                }
            }
        }
    }
}
"""
SOURCES = {
    "metal": (lut_model_file.METAL_HEADER, lut_model_file.METAL),
    "cuda": (lut_model_file.CUDA_HEADER, lut_model_file.CUDA),
}
TYPES = {"float": mx.float32, "_Float16": mx.float16}


@pytest.fixture(
    scope="module", params=[("metal", "float"), ("cuda", "float"), ("cuda", "_Float16")]
)
def kernel(request, tmp_path_factory):
    """Return the kernel compiled for the CPU, with the call signature of mlx's kernels.

    Skips without a compiler, or if it lacks the type.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    directory = tmp_path_factory.mktemp("kernel")
    language, kind = request.param
    header, head = SOURCES[language]
    source = SHIM.replace("SOURCE", head + lut_model_file.BODY)
    source = source.replace("HEADER", f"using T = {kind};{header}")
    (directory / "lut.cpp").write_text(source)
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC"]
    probe = [*command[:2], "-xc++", "-fsyntax-only", "-"]
    if subprocess.run(probe, input=f"{kind} x;".encode(), capture_output=True).returncode:
        pytest.skip(f"g++ does not support {kind}")
    subprocess.run([*command, "-o", "lut.so", "lut.cpp"], cwd=directory, check=True)
    run = ctypes.CDLL(str(directory / "lut.so")).run
    calls = []

    def call(*, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        assert output_dtypes == [TYPES[kind]] and grid[0] % 32 == 0 == threadgroup[0] % 32
        sizes = [dict(template)[name] for name in ("IN", "OUT", "BITS", "OUTLIERS")]
        arrays = [np.ascontiguousarray(np.array(array)) for array in inputs]
        y = np.full(output_shapes[0], np.nan, np.array(inputs[0]).dtype)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (*arrays, y)]
        threads = -(-grid[0] // threadgroup[0]) * threadgroup[0]  # some threads have no row
        run(*pointers, *sizes, threads, grid[1], threadgroup[0])
        calls.append(grid)
        return [mx.array(y)]

    call.calls, call.dtype = calls, TYPES[kind]
    return call


def random_layer(inputs, outputs, bits, outliers, bias=True):
    rng = np.random.default_rng(inputs + bits)
    layer = LUTLinear(inputs, outputs, bias, bits=bits, outliers=outliers)
    layer.weight = mx.array(rng.integers(0, 2**32, layer.weight.shape, np.uint32))
    if outliers:
        columns = [rng.permutation(inputs)[:outliers] for _ in range(outputs)]
        layer.indices = mx.array(np.array(columns).astype(np.uint16))
    for leaf in ("codebook", *(["outliers"] if outliers else []), *(["bias"] if bias else [])):
        layer[leaf] = mx.array(rng.standard_normal(layer[leaf].shape).astype(np.float32))
    return layer


def numpy_weight(layer, inputs):
    """Unpack the codes bit by bit and look them up."""
    words, codebook = np.array(layer.weight), np.array(layer.codebook)
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(len(words), inputs, layer.bits) @ (1 << np.arange(layer.bits))
    w = np.take_along_axis(codebook, codes, axis=1).astype(np.float64)
    if "outliers" in layer:
        for row, (columns, values) in enumerate(zip(layer.indices, layer.outliers, strict=True)):
            w[row, np.array(columns)] += np.array(values)
    return w


@pytest.mark.parametrize(("outliers", "outputs"), [(0, 7), (3, 1), (32, 5)])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("inputs", [32, 96, 288])
def test_kernel_and_operations_compute_the_product(
    kernel, monkeypatch, inputs, outputs, bits, outliers
):
    layer = random_layer(inputs, outputs, bits, outliers, bias=outliers == 0)
    layer.set_dtype(kernel.dtype)
    w = numpy_weight(layer, inputs)
    x = mx.random.normal((1, 3, inputs), key=mx.random.key(bits)).astype(kernel.dtype)
    expected = np.array(x, np.float64) @ w.T + (np.array(layer.bias) if "bias" in layer else 0)
    limit = (1e-5 if kernel.dtype == mx.float32 else 2e-3) * abs(expected).max()
    np.testing.assert_allclose(np.array(layer.dense()), w, rtol=0, atol=limit)
    np.testing.assert_allclose(np.array(layer(x)), expected, rtol=0, atol=limit)
    calls = len(kernel.calls)
    monkeypatch.setattr(lut_model_file, "_kernel", lambda: kernel)
    np.testing.assert_allclose(np.array(layer(x)), expected, rtol=0, atol=limit)
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
    widths = rng.permutation(np.repeat([bits - 1, bits, bits, bits, bits + 1], group_size))
    parts, dense = [], np.empty((24, len(widths)))
    for width in (bits - 1, bits, bits + 1):
        inputs = np.flatnonzero(widths == width)
        codes = rng.integers(0, 2**width, (24, len(inputs)))
        per_group = rng.standard_normal((2, 24, len(inputs) // group_size)).astype(np.float32)
        scales, biases = np.repeat(per_group, group_size, axis=2)
        dense[:, inputs] = scales * codes + biases
        arrays = (pack(mx.array(codes), width), *map(mx.array, per_group))
        parts.append([array.reshape(-1) for array in arrays])
    layer = MixedLinear(5 * group_size, 24, bits=bits, group_size=group_size)
    stored = dict(
        zip(
            ("weight", "scales", "biases"),
            map(mx.concatenate, zip(*parts, strict=True)),
            strict=True,
        )
    )
    stored |= {"widths": mx.array(widths, mx.uint8), "bias": mx.random.normal((24,))}
    assert {k: v.shape for k, v in stored.items()} == {
        k: v.shape for k, v in layer.parameters().items()
    }
    layer.update(stored)
    np.testing.assert_allclose(np.array(layer.dense()), dense, rtol=1e-6, atol=1e-5)
    for shape in ((5 * group_size,), (1, 5 * group_size), (2, 9, 5 * group_size)):
        x = mx.random.normal(shape)
        expected = np.array(x, np.float64) @ dense.T + np.array(stored["bias"])
        np.testing.assert_allclose(
            np.array(layer(x)), expected, rtol=0, atol=1e-5 * abs(expected).max()
        )
    for dtype in (mx.float16, mx.bfloat16):
        layer.set_dtype(dtype)
        assert layer(mx.ones((2, 5 * group_size), dtype)).dtype == dtype
