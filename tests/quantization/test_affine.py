"""Affine quantization: equal to mlx.core.quantize, and within the error bounds of the format."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitquant_mlx import RecipeError, dequantize, quantize, quantize_parts, split
from splitquant_mlx.quantization.affine import pack

BITS = (2, 3, 4, 5, 6, 8)


def weight(rows=16, columns=256, seed=0, dtype=mx.float32, scale=0.02):
    w = np.random.default_rng(seed).standard_normal((rows, columns)) * scale
    return mx.array(w.astype(np.float32)).astype(dtype)


def unpack(words: mx.array, bits: int) -> mx.array:
    """Unpack uint32 words (..., m) into codes (..., m * 32 / bits), uint32."""
    blocks = words.reshape(*words.shape[:-1], -1, bits)
    codes = []
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        code = blocks[..., word] >> offset
        if offset + bits > 32:
            code = code | (blocks[..., word + 1] << (32 - offset))
        codes.append(code & (2**bits - 1))
    return mx.stack(codes, axis=-1).reshape(*words.shape[:-1], -1)


@pytest.mark.parametrize("bits", BITS)
def test_pack_is_mlx_layout_and_unpack_its_inverse(bits):
    w = weight()
    words, scales, biases = mx.quantize(w, 64, bits)
    codes = unpack(words, bits)
    groups = codes.astype(mx.float32).reshape(16, 4, 64)
    w_hat = (groups * scales[..., None] + biases[..., None]).reshape(16, 256)
    assert mx.allclose(w_hat, mx.dequantize(words, scales, biases, 64, bits), atol=1e-7)
    assert mx.array_equal(pack(codes, bits), words)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_group_granularity_is_mlx_quantize(mode):
    group_size, bits = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}[
        mode
    ]
    w = weight(dtype=mx.bfloat16)
    ours = quantize(w, bits=bits, group_size=group_size, mode=mode)
    theirs = mx.quantize(w, group_size, bits, mode)
    for a, b in zip(ours, theirs, strict=False):
        assert mx.array_equal(a, b)
    w_hat = dequantize(ours, bits=bits, group_size=group_size, mode=mode)
    expected = mx.dequantize(*theirs, group_size=group_size, bits=bits, mode=mode)
    assert mx.allclose(w_hat, expected.astype(mx.float32), atol=1e-3)


@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
@pytest.mark.parametrize("bits", BITS)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), exponent=st.integers(-5, 5), shift=st.floats(-2, 2))
def test_error_is_within_a_scale(granularity, bits, seed, exponent, shift):
    """|w - w_hat| <= |scale|: half a step of rounding, up to half a step to put 0 on the grid."""
    w = (weight(4, 128, seed, scale=1.0) + shift) * 10.0**exponent
    q = quantize(w, bits=bits, group_size=32, granularity=granularity)
    bound = mx.repeat(mx.abs(q.scales), 32, axis=-1) * 1.001
    assert mx.all(mx.abs(w - dequantize(q, bits=bits, group_size=32)) <= bound)


def test_one_scale_per_channel_or_tensor():
    w = weight()
    channel = quantize(w, granularity="channel")
    tensor = quantize(w, granularity="tensor")
    assert mx.all(channel.scales == channel.scales[:, :1])
    assert len(set(channel.scales[:, 0].tolist())) > 1
    assert mx.all(tensor.scales == tensor.scales[0, 0])


def test_channel_granularity_of_one_group_is_mlx_quantize():
    """If a row is one group, granularities "channel" and "group" are equivalent."""
    w = weight(32, 64)
    for a, b in zip(quantize(w, granularity="channel"), mx.quantize(w, 64, 4), strict=True):
        assert mx.allclose(a.astype(mx.float32), b.astype(mx.float32), rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_zero_of_one_sided_parts_is_exact(bits, dtype):
    """The outer two parts dequantize zeros exactly: errors of zeros would add up over parts."""
    w = weight(64, 512, scale=0.05)
    for part in (split(w)[0], split(w)[2]):
        q = quantize_parts([part], bits=bits, scale_dtype=dtype)
        w_hat = dequantize(q, bits=bits, group_size=64)
        assert mx.all(mx.where(part == 0, w_hat, 0) == 0)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_zeros_have_a_lower_error_than_with_rounded_mlx_scales(dtype):
    w = weight(256, 512, scale=0.05)
    parts = split(w)
    ours = dequantize(quantize_parts(parts, scale_dtype=dtype))
    theirs = []
    for part in parts:
        words, scales, biases = mx.quantize(part, 64, 4)
        scales, biases = (a.astype(dtype).astype(mx.float32) for a in (scales, biases))
        theirs.append(mx.dequantize(words, scales, biases, 64, 4))
    zeros = mx.concatenate(parts, axis=-1) == 0

    def residue(w_hat):
        return mx.sum(mx.where(zeros, w_hat, 0) ** 2).item()

    assert residue(ours) <= residue(mx.concatenate(theirs, axis=-1)) / 2
    total = ours.reshape(256, 3, 512).sum(axis=1)
    assert (
        mx.mean((w - total) ** 2).item() < 0.3 * mx.mean((w - dequantize(quantize(w))) ** 2).item()
    )


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_scale_dtype_follows_the_range(magnitude):
    w = weight(32, 128, scale=1.0) * magnitude
    w_hat = dequantize(quantize_parts(split(w))).reshape(32, 3, 128).sum(axis=1)
    assert mx.all(mx.isfinite(w_hat))
    if magnitude > 1e-20:  # below mlx's smallest scale, 1e-7, all is zero
        error = mx.abs(w - w_hat).max() / mx.abs(w).max()
        assert error.item() < 0.1 or magnitude < 1e-5


def test_indivisible_width_is_rejected():
    with pytest.raises(RecipeError, match=r"group_size 64 does not divide the width 172"):
        quantize(mx.zeros((8, 172)))
    with pytest.raises(RecipeError, match="172"):
        quantize_parts([mx.zeros((8, 172))] * 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 7},
        {"bits": 7, "granularity": "channel"},
        {"bits": 1},
        {"group_size": 0},
        {"group_size": 16},
        {"granularity": "row"},
        {"mode": "int4"},
        {"granularity": "tensor", "mode": "mxfp4", "group_size": 32},
        {"bits": 8, "mode": "mxfp4", "group_size": 32},
    ],
)
def test_settings_are_checked(settings):
    with pytest.raises(RecipeError, match=next(iter(settings))):
        quantize(mx.zeros((8, 128)), **settings)


@pytest.mark.parametrize("w", [mx.zeros(64), mx.zeros((2, 64), mx.int32)])
def test_non_weights_are_rejected(w):
    with pytest.raises(RecipeError, match="float weight of two or more axes"):
        quantize(w)


@pytest.mark.parametrize("settings", [{"bits": 3}, {"group_size": 32}, {"mode": "mxfp4"}])
def test_settings_of_another_weight_are_rejected(settings):
    with pytest.raises(RecipeError, match="do not match the weight"):
        dequantize(quantize(mx.zeros((8, 128))), **settings)
