"""GPTQ and coordinate descent: against brute force and the published form of GPTQ."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx import Quantized, dequantize
from splitquant_mlx.quantization import gptq, rounding
from splitquant_mlx.quantization.gptq import (
    compensated_grid,
    damped_hessian,
    gptq_quantize,
    unit_upper,
)
from splitquant_mlx.quantization.imatrix import quantize_weighted


def problem(seed, out=24, channels=128, tokens=400, rank=12):
    """Return a weight and the Hessian of correlated inputs with a few large channels."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((rank, channels)) * 2
    x = rng.standard_normal((tokens, rank)) @ mix + rng.standard_normal((tokens, channels))
    x[:, rng.integers(0, channels, 2)] *= 10
    w = rng.standard_normal((out, channels)).astype(np.float32)
    return w, (x.T @ x / tokens).astype(np.float32)


def dequantized(grid):
    groups = zip(grid.codes, grid.scales, grid.biases, strict=True)
    return np.concatenate([np.array(codes * scale + bias) for codes, scale, bias in groups])


def cost(columns, grid, h):
    """Return tr(E^T h E) of the error E (in, out) of a grid."""
    error = columns - dequantized(grid)
    return float(np.sum((h @ error) * error, dtype=np.float64))


def output_error(w, quantized, h, **settings_):
    error = np.array(w, np.float64) - np.array(dequantize(quantized, **settings_), np.float64)
    return np.sum((error @ h) * error)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3, 4, 6]),
    group_size=st.sampled_from([32, 64]),
    dtype=st.sampled_from([mx.float16, mx.bfloat16, mx.float32]),
)
def test_cost_never_rises(seed, bits, group_size, dtype):
    w, hessian = problem(seed)
    h = damped_hessian(hessian)
    columns = np.ascontiguousarray(w.T)
    grid = compensated_grid(columns, h, unit_upper(h).T, dtype, bits, group_size)
    costs = [cost(columns, grid, h)]
    for refit in (True, False, True, False):
        grid.sweep(refit=refit)
        costs.append(cost(columns, grid, h))
    slack = 1e-5 * costs[0]
    assert all(after <= before + slack for before, after in itertools.pairwise(costs)), costs
    assert costs[-1] < costs[0]
    packed = grid.packed()
    np.testing.assert_array_equal(
        np.array(dequantize(packed, bits=bits, group_size=group_size)).T.round(5),
        dequantized(grid).round(5),
    )


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_better_methods_have_a_lower_error(bits):
    w, hessian = problem(5, out=64, channels=256)
    h = damped_hessian(hessian).astype(np.float64)
    array, sizes = mx.array(w), {"bits": bits, "group_size": 64}
    plain = Quantized(*mx.quantize(array, 64, bits))
    fitted = quantize_weighted(array, mx.array(np.diagonal(hessian).copy()), **sizes)
    compensated = gptq_quantize(array, hessian, **sizes, sweeps=0)
    swept = gptq_quantize(array, hessian, **sizes, sweeps=3)
    errors = [output_error(w, q, h, **sizes) for q in (plain, fitted, compensated, swept)]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.9 * errors[1]
    assert errors[3] < 0.97 * errors[2]


def test_mlx_and_numpy_agree(monkeypatch):
    """With numpy in place of the GPU kernel."""
    monkeypatch.setattr(
        rounding,
        "_by_kernel",
        lambda *arrays: map(mx.array, rounding._by_numpy(*map(np.array, arrays))),
    )
    w, hessian = problem(3, out=40)
    h = damped_hessian(hessian)
    columns = np.ascontiguousarray(w.T)
    feedback = unit_upper(h).T
    grids = [
        compensated_grid(kind(columns), kind(h), kind(feedback), mx.float32, 4, 64)
        for kind in (np.array, mx.array)
    ]
    for grid in grids:
        grid.sweep()
        grid.sweep(refit=False)
    expected, actual = (cost(columns, grid, h) for grid in grids)
    assert actual == pytest.approx(expected, rel=0.01)
    same = [a == np.array(b) for a, b in zip(grids[0].codes, grids[1].codes, strict=True)]
    assert np.mean(same) > 0.98
    packed = grids[1].packed()
    assert packed.weight.shape == (40, 128 // 8) and packed.scales.shape == (40, 2)


def test_blocks_of_rows_equal_the_whole(monkeypatch):
    w, hessian = problem(4, out=50, channels=128)
    whole = gptq_quantize(mx.array(w), hessian)
    monkeypatch.setattr(gptq, "BLOCK", 16 * 128)
    with ThreadPoolExecutor(3) as threads:
        blocks = gptq_quantize(mx.array(w), hessian, map_blocks=threads.map)
    values = [np.array(dequantize(q, bits=4, group_size=64)) for q in (blocks, whole)]
    assert np.isclose(*values).mean() > 0.99


@pytest.mark.parametrize("channels", [64, 256, 600])
@pytest.mark.parametrize("kind", [np.array, mx.array])
def test_factor_is_unit_upper_triangular(channels, kind):
    h = damped_hessian(problem(2, out=1, channels=channels)[1])
    u = np.array(unit_upper(kind(h)), np.float64)
    np.testing.assert_array_equal(np.tril(u), np.eye(channels))
    d = np.linalg.inv(u) @ h @ np.linalg.inv(u).T
    np.testing.assert_allclose(d, np.diag(np.diagonal(d)), atol=2e-4 * np.diagonal(h).max())
    assert np.diagonal(d).min() > 0


def test_compensation_equals_published_gptq():
    """Against the inverse-Hessian form of the paper (algorithm 1), with fixed scales."""
    w, hessian = problem(7, out=5, channels=64)
    h = damped_hessian(hessian)
    columns = np.ascontiguousarray(w.T)
    grid = compensated_grid(columns, h, unit_upper(h).T, mx.float32, 4, 64)
    scale, bias = grid.scales[0].astype(np.float64), grid.biases[0].astype(np.float64)
    inverse = np.linalg.inv(h.astype(np.float64))
    factor = np.linalg.cholesky(inverse).T
    rest = columns.astype(np.float64)
    for k in range(64):
        codes = np.clip(np.rint((rest[k] - bias) / scale), 0, 15)
        error = (rest[k] - codes * scale - bias) / factor[k, k]
        rest[k + 1 :] -= factor[k, k + 1 :, None] * error
        np.testing.assert_array_equal(codes, grid.codes[0][k])


def test_descent_converges_to_a_local_optimum():
    w, hessian = problem(9, out=3, channels=32)
    h = damped_hessian(hessian)
    columns = np.ascontiguousarray(w.T)
    grid = compensated_grid(columns, h, unit_upper(h).T, mx.float32, 2, 32)
    for _ in range(20):
        grid.sweep(refit=False)
    best = cost(columns, grid, h)
    for channel, row, code in itertools.product(range(32), range(3), range(4)):
        before = grid.codes[0][channel, row]
        grid.codes[0][channel, row] = code
        assert cost(columns, grid, h) >= best * (1 - 1e-5)
        grid.codes[0][channel, row] = before


@pytest.mark.parametrize(
    "degrade",
    [
        lambda hessian: hessian * 0,
        lambda hessian: hessian * np.outer(np.arange(128) > 3, np.arange(128) > 3),
        lambda hessian: np.ones_like(hessian),
        lambda hessian: hessian * 1e12,
        lambda hessian: hessian * 1e-20,
    ],
    ids=["no input", "dead channels", "rank one", "huge", "tiny"],
)
def test_degenerate_inputs(degrade):
    w, hessian = problem(11)
    quantized = gptq_quantize(mx.array(w), degrade(hessian).astype(np.float32))
    error = np.abs(w - np.array(dequantize(quantized)))
    assert np.isfinite(error).all()
    assert error.max() < 3


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("bits", [2, 8])
def test_vanishing_weights(bits, dtype):
    """Like those of an unused expert after long weight decay."""
    w, hessian = problem(11)
    w[: len(w) // 2] *= 1e-39
    hessian[:, 20:] = hessian[20:] = 0
    quantized = gptq_quantize(mx.array(w).astype(dtype), hessian.astype(np.float32), bits=bits)
    w_hat = np.array(dequantize(quantized, bits=bits))
    assert np.isfinite(w_hat).all() and np.abs(w_hat[: len(w) // 2]).max() < 1e-30


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("size", [1e2, 1e6])
def test_groups_of_equal_weights_under_large_inputs(size, dtype):
    rng = np.random.default_rng(0)
    x = size * (1 + rng.normal(size=(256, 128)))
    w = rng.normal(size=(16, 128))
    w[:, :64] = w[:, :1]
    w[3, 64:] = 0.5 + 1e-6 * w[3, 64:]
    quantized = gptq_quantize(mx.array(w).astype(dtype), (x.T @ x / 256).astype(np.float32))
    error = np.abs(w - np.array(dequantize(quantized).astype(mx.float32)))
    assert error.max() < 0.5
