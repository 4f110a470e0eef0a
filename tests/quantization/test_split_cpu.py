"""Parts quantized in numpy against the plain formulas, and against parts quantized by mlx."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx import dequantize
from splitquant_mlx.quantization.affine import EPS, code_parts, pack
from splitquant_mlx.quantization.split import cluster_weight, parts_of
from splitquant_mlx.quantization.split_cpu import BLOCK, code_split


def plain(part, bits):
    """Return codes, scales and biases of one part, groups along the last axis, by the formulas."""
    low, high = part.min(-1, keepdims=True), part.max(-1, keepdims=True)
    top, low_edge = np.float32(2**bits - 1), -low > high
    scale = np.maximum((high - low) / top, np.float32(EPS)) * np.where(low_edge, 1, -1)
    scale, edge = scale.astype(np.float32), np.where(low_edge, low, high)
    zero = -np.rint(edge / scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(zero == 0, scale, edge / -zero)
    bias = np.where((zero == 0) | (zero == top), np.float32(0), edge)
    scale = np.where(zero == top, -scale, scale)
    inverse = 1 / scale
    return np.clip(np.rint(part * inverse - bias * inverse), 0, top), scale, bias


def check_equal(w, bounds, clusters, bits, group_size, ours):
    """Codes, scales and biases equal those of the plain formulas, bit for bit."""
    parts = parts_of(w.astype(mx.float32), SimpleNamespace(upper_bounds=bounds), clusters)
    parts = np.stack([np.array(part).reshape(len(w), -1, group_size) for part in parts], 1)
    codes, *rest = plain(parts, bits)
    packed = pack(mx.array(codes.reshape(len(w), -1)), bits)
    assert mx.array_equal(ours.weight, packed)
    for array, expected in zip(ours[1:], rest, strict=True):
        assert np.array(array).tobytes() == expected.tobytes()


def check(w, clusters, bits, group_size):
    """Scales and biases equal mlx's; no code is further from its entry than mlx's."""
    clustering = cluster_weight(w, clusters)
    parts = parts_of(w.astype(mx.float32), clustering, clusters)
    settings = {"bits": bits, "group_size": group_size}
    ours = code_split(w, clustering.upper_bounds, clusters, **settings)
    theirs = code_parts(parts, **settings, granularity="group")
    check_equal(w, clustering.upper_bounds, clusters, bits, group_size, ours)
    assert mx.array_equal(ours.scales, theirs.scales)
    assert mx.array_equal(ours.biases, theirs.biases)
    w_split = mx.concatenate(parts, axis=-1)
    error, allowed = (mx.abs(w_split - dequantize(q, **settings)) for q in (ours, theirs))
    slack = mx.repeat(mx.abs(ours.scales), group_size, axis=-1) * 1e-4
    assert mx.all(error <= allowed + slack)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1, 128), (7, 384), (32, 128)]),
    dtype=st.sampled_from([mx.float16, mx.bfloat16, mx.float32]),
    values=st.sampled_from([2, 5, 10**6]),
    shift=st.sampled_from([0.0, 0.5, -3.0, 40.0]),
    magnitude=st.sampled_from([1e-4, 1.0, 100.0]),
    clusters=st.integers(2, 5),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group_size=st.sampled_from([32, 64, 128]),
)
def test_matches_mlx(seed, shape, dtype, values, shift, magnitude, clusters, bits, group_size):
    rng = np.random.default_rng(seed)
    w = rng.choice(rng.standard_normal(values), shape) + shift
    w = mx.array((w * magnitude).astype(np.float32)).astype(dtype)
    check(w, clusters, bits, group_size)


def test_shorter_last_block_of_rows():
    rows = BLOCK // 256 + 3
    w = np.random.default_rng(0).standard_normal((rows, 256)).astype(np.float32)
    check(mx.array(w), 3, 4, 64)


def test_row_wider_than_a_block():
    w = np.random.default_rng(0).standard_normal((2, 2 * BLOCK)).astype(np.float32)
    check(mx.array(w), 3, 4, 128)


def test_zeros_and_single_outliers():
    w = np.zeros((4, 256), np.float32)
    w[1, 7], w[2, 200] = 3.0, -5.0
    check(mx.array(w), 3, 4, 64)
