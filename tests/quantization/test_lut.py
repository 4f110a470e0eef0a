"""Codebooks are optimal for each row; optimizing them in turn with codes lowers the error."""

from itertools import combinations, pairwise, product

import mlx.core as mx
import numpy as np
import pytest

from splitquant_mlx.nn.lut_model_file import lut_weight
from splitquant_mlx.quantization.affine import dequantize, quantize
from splitquant_mlx.quantization.codebook import nearest, row_codebooks
from splitquant_mlx.quantization.gptq import damped_hessian, gptq_quantize
from splitquant_mlx.quantization.lut import lut_quantize


def inertia(x, m, cuts):
    spans = [slice(a, b) for a, b in pairwise(cuts)]
    return sum((m[s] * (x[s] - np.average(x[s], weights=m[s])) ** 2).sum() for s in spans)


@pytest.mark.parametrize(("k", "n"), [(2, 12), (3, 12), (4, 12), (8, 14), (16, 19)])
def test_row_codebooks_are_the_optimum(k, n):
    rng = np.random.default_rng(k)
    w, m = rng.standard_normal((6, n)), rng.uniform(0.01, 1, (6, n))
    w[5] = np.round(w[5])  # equal entries
    m[4] = rng.choice([1e-4, 1e2], n)
    inertias = (m * (w - nearest(w, row_codebooks(w, m, k))) ** 2).sum(axis=1)
    for row in range(6):
        order = np.argsort(w[row])
        x, mass = w[row][order], m[row][order]
        cuts = ((0, *inner, n) for inner in combinations(range(1, n), k - 1))
        best = min(inertia(x, mass, c) for c in cuts)
        assert inertias[row] == pytest.approx(best, rel=1e-5, abs=1e-9)


def test_codebook_is_optimal_over_all_assignments():
    """Including clusters that are not intervals."""
    rng = np.random.default_rng(0)
    w, m = rng.standard_normal((1, 8)), rng.uniform(0.01, 1, (1, 8))
    best = np.inf
    for labels in product(range(3), repeat=8):
        members = np.equal.outer(range(3), labels)
        masses = np.maximum((members * m).sum(1), 1e-30)
        means = (members * m * w).sum(1) / masses
        best = min(best, (m[0] * (w[0] - means[list(labels)]) ** 2).sum())
    result = (m * (w - nearest(w, row_codebooks(w, m, 3))) ** 2).sum()
    assert result == pytest.approx(best, rel=1e-6)


def test_row_with_fewer_values_than_codes_is_exact():
    w = np.random.default_rng(0).integers(0, 5, (3, 64)).astype(np.float32)
    m = np.ones_like(w)
    m[1, :32] = 0  # ignored entries
    levels = row_codebooks(w, m, 8)
    assert (np.diff(levels, axis=1) >= 0).all()
    assert np.array_equal(nearest(w, levels)[m > 0], w[m > 0])


@pytest.fixture(scope="module")
def layer():
    """Return a weight with a few large entries, and the Hessian of correlated inputs."""
    rng = np.random.default_rng(0)
    w = rng.standard_t(4, (48, 128)).astype(np.float32)
    x = rng.standard_normal((2000, 128)) @ (np.eye(128) + rng.standard_normal((128, 128)) / 12)
    x *= np.exp(rng.standard_normal(128) / 2)
    return mx.array(w), (x.T @ x / 2000).astype(np.float32)


def row_errors(w, w_hat, hessian):
    error = np.array(w - w_hat.astype(mx.float32)).T
    return ((damped_hessian(hessian) @ error) * error).sum(axis=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_published_order_holds(layer, bits):
    """SqueezeLLM beats rtn, GANQ beats SqueezeLLM, and outliers improve both."""
    w, hessian = layer
    rtn = dequantize(quantize(w, bits=bits, group_size=128), bits=bits, group_size=128)
    errors = {
        name: row_errors(w, lut_weight(*lut_quantize(w, hessian, bits=bits, **kind)), hessian)
        for name, kind in {
            "squeezellm": {"sweeps": 0},
            "ganq": {},
            "sparse": {"sweeps": 0, "outliers": 3},
            "sparse ganq": {"outliers": 3},
        }.items()
    }
    assert errors["squeezellm"].sum() < 0.7 * row_errors(w, rtn, hessian).sum()
    assert (errors["ganq"] <= errors["squeezellm"] * (1 + 1e-5)).all()
    assert errors["ganq"].sum() < 0.85 * errors["squeezellm"].sum()
    assert errors["sparse"].sum() < 0.9 * errors["squeezellm"].sum()
    assert errors["sparse ganq"].sum() < 0.9 * errors["sparse"].sum()
    whole_row = gptq_quantize(w, hessian, bits=bits, group_size=128)
    gptq = row_errors(w, dequantize(whole_row, bits=bits, group_size=128), hessian)
    assert errors["ganq"].sum() < gptq.sum()


def test_more_bits_have_a_lower_error_and_dtype_is_preserved(layer):
    w, hessian = layer[0].astype(mx.bfloat16), layer[1]
    luts = [lut_quantize(w, hessian, bits=bits, outliers=1, sweeps=1) for bits in (2, 3, 4)]
    errors = [row_errors(w, lut_weight(*lut), hessian).sum() for lut in luts]
    assert errors == sorted(errors, reverse=True)
    assert all(lut.codebook.dtype == lut.outliers.dtype == mx.bfloat16 for lut in luts)


def test_powers_of_two_have_one_scale_per_row(layer):
    w, hessian = layer
    lut = lut_quantize(w, hessian, bits=4, powers=True)
    ratios = np.log2(np.abs(np.array(lut.codebook)) / np.array(lut.codebook)[:, -1:])
    assert np.array_equal(ratios[:, :8], np.broadcast_to(-np.arange(8), (48, 8)))
    nearest_codes = lut_quantize(w, hessian, bits=4, powers=True, sweeps=0)
    errors = [row_errors(w, lut_weight(*x), hessian).sum() for x in (lut, nearest_codes)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("w", [np.ones((3, 64)), np.zeros((3, 64)), np.eye(64)[:1] * 1e4])
@pytest.mark.parametrize("hessian", [np.eye(64), np.zeros((64, 64)), np.ones((64, 64))])
def test_degenerate_weights_and_inputs(w, hessian, bits):
    for outliers in (0, 1, 6):
        settings = {"bits": bits, "outliers": outliers}
        lut = lut_quantize(mx.array(w, mx.float16), hessian.astype(np.float32), **settings)
        np.testing.assert_allclose(np.array(lut_weight(*lut)), w, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("outliers", [64, 63, 1])
def test_outliers_up_to_all_of_a_row(outliers):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((5, 64)), rng.standard_normal((99, 64))
    lut = lut_quantize(
        mx.array(w, mx.float32), (x.T @ x / 99).astype(np.float32), outliers=outliers
    )
    assert all(len(set(row)) == outliers for row in lut.indices.tolist())
    if outliers > 60:
        np.testing.assert_allclose(np.array(lut_weight(*lut)), w, atol=2e-5)
