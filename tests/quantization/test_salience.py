"""Salient inputs get one bit more, as many others one less; the average is as requested."""

import mlx.core as mx
import numpy as np
import pytest

from splitquant_mlx.nn.lut_model_file import mixed_weight
from splitquant_mlx.quantization.affine import dequantize
from splitquant_mlx.quantization.gptq import damped_hessian, gptq_quantize
from splitquant_mlx.quantization.salience import salience_quantize


def layer(out, width, strong):
    """Return a weight and the Hessian of its inputs, `strong` of them 10 times the others."""
    rng = np.random.default_rng(width + strong)
    x = rng.standard_normal((2000, width)) @ (np.eye(width) + rng.standard_normal((width,) * 2) / 9)
    x[:, rng.permutation(width)[:strong]] *= 10
    return mx.array(rng.standard_normal((out, width)).astype(np.float16)), hessian_of(x)


def hessian_of(x):
    return (x.T @ x / len(x)).astype(np.float32)


def error(w, w_hat, hessian):
    e = np.array(w.astype(mx.float32) - w_hat).T
    return float(((damped_hessian(hessian) @ e) * e).sum())


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_lower_error_than_gptq_of_the_same_size(bits, group_size):
    w, hessian = layer(40, 256, 64)
    mixed = salience_quantize(w, hessian, bits=bits, group_size=group_size)
    plain = gptq_quantize(w, hessian, bits=bits, group_size=group_size)
    counts = np.bincount(np.array(mixed.widths), minlength=bits + 2)
    assert counts[bits - 1] == counts[bits + 1] > 0 == counts[bits + 1] % group_size
    strong = np.argsort(np.diagonal(hessian))[-64:]
    assert (np.array(mixed.widths)[strong] > bits).all()
    assert all(a.size == b.size for a, b in zip(mixed[:3], plain, strict=True))
    gptq = dequantize(plain, bits=bits, group_size=group_size)
    assert error(w, mixed_weight(*mixed), hessian) < 0.8 * error(w, gptq, hessian)


def test_equal_salience_is_gptq():
    w, _ = layer(32, 128, 0)
    mixed = salience_quantize(w, np.eye(128, dtype=np.float32), bits=3, group_size=64)
    plain = gptq_quantize(w, np.eye(128, dtype=np.float32), bits=3, group_size=64)
    for actual, expected in zip(mixed, plain, strict=False):
        assert mx.array_equal(actual, expected.reshape(-1))
    assert (np.array(mixed.widths) == 3).all()


@pytest.mark.parametrize("w", [mx.ones((4, 64)), mx.zeros((4, 64)), 1e4 * mx.eye(64)[:1]])
@pytest.mark.parametrize("hessian", [np.eye(64), np.zeros((64, 64)), np.ones((64, 64))])
def test_degenerate_weights_and_inputs(w, hessian):
    for bits in (2, 5):
        mixed = salience_quantize(w, hessian.astype(np.float32), bits=bits, group_size=32)
        w_hat = np.array(mixed_weight(*mixed))
        assert np.array_equal(mixed_weight(*mixed, slice(None, None, 3)), w_hat[::3])
        assert np.abs(w_hat - np.array(w)).max() <= 2e-2 * np.abs(np.array(w)).max()
