"""Fitted scales: never worse than round to nearest under the given importance."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx import Quantized, dequantize, split
from splitquant_mlx.quantization.affine import code_parts, round_scales
from splitquant_mlx.quantization.imatrix import code_parts_weighted, quantize_weighted

DTYPES = [mx.float16, mx.bfloat16, mx.float32]


def weighted_errors(w, quantized, importance, bits, group_size):
    """Return the sum of h (w - w_hat)^2 per group, in float64."""
    w_hat = np.array(dequantize(quantized, bits=bits, group_size=group_size), np.float64)
    error = (np.array(w.astype(mx.float32), np.float64) - w_hat) ** 2 * importance
    return error.reshape(w.shape[0], -1, group_size).sum(-1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    scale=st.sampled_from([1e-2, 1.0, 100.0]),
)
def test_no_group_is_worse_than_rtn(seed, bits, group_size, dtype, spread, scale):
    rng = np.random.default_rng(seed)
    w = mx.array(scale * rng.standard_t(4, (8, 256)), mx.float32).astype(dtype)
    importance = np.exp(spread * rng.standard_normal(256)).astype(np.float32)
    fitted = quantize_weighted(w, mx.array(importance), bits=bits, group_size=group_size)
    plain = Quantized(*mx.quantize(w, group_size, bits))
    assert fitted.scales.dtype == fitted.biases.dtype == dtype
    assert [a.shape for a in fitted] == [a.shape for a in plain]
    ours = weighted_errors(w, fitted, importance, bits, group_size)
    theirs = weighted_errors(w, plain, importance, bits, group_size)
    # the fit adds a ten-thousandth of the mean to every importance, and sums in float32
    assert np.all(ours <= theirs * 1.01 + 1e-7 * scale**2)


def test_unequal_importance_lowers_the_error():
    rng = np.random.default_rng(0)
    w = mx.array(rng.standard_normal((64, 512)), mx.float32)
    importance = np.exp(2 * rng.standard_normal(512)).astype(np.float32)
    fitted = quantize_weighted(w, mx.array(importance))
    plain = Quantized(*mx.quantize(w, 64, 4))
    ours, theirs = (weighted_errors(w, q, importance, 4, 64).sum() for q in (fitted, plain))
    assert ours < 0.7 * theirs


def test_codes_are_the_nearest_to_the_stored_scales():
    rng = np.random.default_rng(1)
    w = mx.array(rng.standard_normal((16, 128)), mx.float32).astype(mx.float16)
    fitted = quantize_weighted(w, mx.ones(128), bits=3, group_size=32)
    values = np.array(w.astype(mx.float32)).reshape(16, 4, 32)
    scales, biases = (np.array(a.astype(mx.float32))[..., None] for a in fitted[1:])
    levels = scales * np.arange(8) + biases
    nearest = np.abs(values[..., None] - levels[:, :, None, :]).min(-1)
    w_hat = np.array(dequantize(fitted, bits=3, group_size=32)).reshape(16, 4, 32)
    np.testing.assert_allclose(np.abs(values - w_hat), nearest, atol=1e-5)


@pytest.mark.parametrize("importance", [np.zeros(64), np.eye(64)[3] * 1e-30, np.full(64, 1e30)])
def test_degenerate_importance(importance):
    w = mx.array(np.random.default_rng(2).standard_normal((4, 64)), mx.float32)
    fitted = quantize_weighted(w, mx.array(importance.astype(np.float32)))
    error = mx.abs(w - dequantize(fitted)).max().item()
    assert error < 2 * mx.abs(fitted.scales).max().item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_and_tiny_groups(dtype):
    w = mx.concatenate([mx.zeros((2, 64)), mx.full((2, 64), 0.7), mx.full((2, 64), -1e-7)])
    fitted = quantize_weighted(w.astype(dtype), mx.ones(64))
    error = mx.abs(w - dequantize(fitted)).max().item()
    assert np.isfinite(error) and error < 1e-2


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    clusters=st.integers(2, 4),
    shift=st.sampled_from([0.0, 0.5, 3.0]),
)
def test_no_group_of_a_part_is_worse_and_zeros_stay_exact(seed, bits, group_size, clusters, shift):
    rng = np.random.default_rng(seed)
    w = mx.array(0.1 * rng.standard_t(4, (8, 256)) + 0.1 * shift, mx.float32)
    importance = np.exp(2 * rng.standard_normal(256)).astype(np.float32)
    sizes = {"bits": bits, "group_size": group_size}
    parts = split(w, clusters)
    fitted = code_parts_weighted(parts, mx.array(importance), **sizes)
    plain = code_parts(parts, **sizes, granularity="group")
    inside = np.concatenate([np.array(part) for part in parts], axis=-1) != 0
    weights = np.tile(importance, clusters) * inside
    whole = mx.concatenate(parts, axis=-1)
    ours, theirs = (weighted_errors(whole, q, weights, bits, group_size) for q in (fitted, plain))
    assert np.all(ours <= theirs * 1.01 + 1e-9)

    rounded = round_scales(fitted, bits, mx.float32)
    values = np.array(dequantize(rounded, **sizes))
    one_sided = np.array(rounded.biases) == 0
    zeros = ~inside & np.repeat(one_sided, group_size, axis=-1)
    assert np.all(values[zeros] == 0)
    assert np.abs(values[~inside]).max(initial=0) <= 1e-6 * np.abs(np.array(w)).max()


def test_fitted_parts_have_a_lower_error():
    rng = np.random.default_rng(3)
    w = mx.array(rng.standard_normal((64, 512)), mx.float32)
    importance = np.exp(2 * rng.standard_normal(512)).astype(np.float32)
    parts = split(w)
    fitted = code_parts_weighted(parts, mx.array(importance), bits=4, group_size=64)
    plain = code_parts(parts, bits=4, group_size=64, granularity="group")

    def error(quantized):
        w_hat = dequantize(round_scales(quantized, 4, mx.float16)).reshape(64, 3, 512).sum(1)
        return (np.array(w - w_hat, np.float64) ** 2 * importance).sum()

    assert error(fitted) < 0.7 * error(plain)
