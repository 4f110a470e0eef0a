"""Fitted scale and bias of a group: better than round to nearest, in numpy and mlx."""

import mlx.core as mx
import numpy as np
import pytest

from splitquant_mlx.quantization.group_fit import fit_groups


def half(values):
    return values.astype(mx.float16 if isinstance(values, mx.array) else np.float16).astype(
        mx.float32 if isinstance(values, mx.array) else np.float32
    )


def error(columns, scale, bias, importance, top):
    codes = np.clip(np.rint((columns - bias) / scale), 0, top)
    return importance @ (columns - codes * scale - bias) ** 2


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_lower_error_than_rtn(bits):
    rng = np.random.default_rng(bits)
    columns = rng.standard_t(5, (64, 200)).astype(np.float32)
    importance = np.exp(rng.standard_normal(64)).astype(np.float32)
    w = mx.array(columns.T).astype(mx.float16)
    columns = np.array(w.astype(mx.float32)).T
    fitted = error(
        columns,
        *fit_groups(columns, importance, top=2**bits - 1, stored=half),
        importance,
        2**bits - 1,
    )
    plain = np.array(mx.dequantize(*mx.quantize(w, 64, bits), 64, bits).astype(mx.float32)).T
    assert fitted.sum() < 0.9 * (importance @ (columns - plain) ** 2).sum()


def test_mlx_and_numpy_agree():
    rng = np.random.default_rng(1)
    columns = rng.standard_normal((32, 50)).astype(np.float32)
    importance = np.exp(rng.standard_normal(32)).astype(np.float32)
    fitted = [
        fit_groups(kind(columns), kind(importance), top=15, stored=half)
        for kind in (np.array, mx.array)
    ]
    sums = [error(columns, *map(np.array, pair), importance, 15).sum() for pair in fitted]
    assert sums[1] == pytest.approx(sums[0], rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.7, -1e-7, 1e-40])
def test_constant_weights(value):
    columns = np.full((32, 3), value, np.float32)
    scale, bias = fit_groups(columns, np.ones(32, np.float32), top=15, stored=half)
    assert (scale != 0).all()
    assert np.abs(bias - value).max() < 1e-3
