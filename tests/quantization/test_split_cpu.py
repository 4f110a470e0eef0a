"""Parts quantized in numpy against the same parts quantized by mlx."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx import dequantize
from splitquant_mlx.quantization.affine import code_parts
from splitquant_mlx.quantization.split import cluster_weight, parts_of
from splitquant_mlx.quantization.split_cpu import BLOCK, code_split


def check(w, clusters, bits, group_size):
    """Scales and biases equal mlx's; no code is further from its entry than mlx's."""
    clustering = cluster_weight(w, clusters)
    parts = parts_of(w.astype(mx.float32), clustering, clusters)
    settings = {"bits": bits, "group_size": group_size}
    ours = code_split(w, clustering.upper_bounds, clusters, **settings)
    theirs = code_parts(parts, **settings, granularity="group")
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
