"""Split layers compute the same function as the layers they replace, in any mlx.nn model."""

from functools import reduce

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from splitquant_mlx import (
    QuantizedSplitConv,
    QuantizedSplitLinear,
    RecipeError,
    SplitConv,
    SplitLinear,
    quantize_split_layers,
    split,
    split_model,
)


class ConvNet(nn.Module):
    """A small image classifier: grouped, strided and dilated convolutions, then a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=False)
        self.grouped = nn.Conv2d(16, 32, 3, padding=2, dilation=2, groups=4)
        self.sequence = nn.Conv1d(32, 24, 5, padding=2)
        self.head = nn.Linear(24, 10)

    def __call__(self, x):
        x = nn.relu(self.stem(x))
        x = nn.relu(self.grouped(nn.relu(self.depthwise(x))))
        x = nn.relu(self.sequence(x.reshape(x.shape[0], -1, 32)))
        return self.head(x.mean(axis=1))


def relative(actual, expected):
    return (mx.abs(actual - expected).max() / mx.abs(expected).max()).item()


def test_split_linear_computes_the_same():
    mx.random.seed(0)
    linear = nn.Linear(96, 40)
    layer = SplitLinear.from_linear(linear, clusters=4)
    x = mx.random.normal((2, 5, 96))
    assert relative(layer(x), linear(x)) < 1e-6
    assert mx.array_equal(layer.bias, linear.bias)
    for part, expected in zip(layer.parts, split(linear.weight, 4), strict=True):
        assert mx.array_equal(part, expected)
    assert "clusters=4" in repr(layer) and "input_dims=96" in repr(layer)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_quantized_split_linear_is_the_sum_of_its_parts(bits, bias):
    mx.random.seed(1)
    layer = SplitLinear.from_linear(nn.Linear(128, 48, bias=bias))
    quantized = layer.to_quantized(group_size=32, bits=bits)
    assert isinstance(quantized, QuantizedSplitLinear)
    x = mx.random.normal((3, 128))
    words, groups = 128 * bits // 32, 128 // 32
    expected = layer.bias if bias else 0
    for c in range(3):
        expected = expected + mx.quantized_matmul(
            x,
            mx.contiguous(quantized.weight[:, c * words : (c + 1) * words]),
            scales=mx.contiguous(quantized.scales[:, c * groups : (c + 1) * groups]),
            biases=mx.contiguous(quantized.biases[:, c * groups : (c + 1) * groups]),
            group_size=32,
            bits=bits,
        )
    assert relative(quantized(x), expected) < 1e-5
    assert f"bits={bits}" in repr(quantized)


def test_output_has_the_dtype_of_the_input():
    layer = SplitLinear.from_linear(nn.Linear(64, 32)).to_quantized()
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        layer.set_dtype(dtype, lambda d: d == mx.float32 or mx.issubdtype(d, mx.floating))
        assert layer(mx.ones((1, 64), dtype)).dtype == dtype


def test_more_bits_are_closer():
    mx.random.seed(2)
    linear = nn.Linear(256, 64)
    x = mx.random.normal((8, 256))
    layer = SplitLinear.from_linear(linear)
    errors = [relative(layer.to_quantized(bits=b)(x), linear(x)) for b in (2, 3, 4, 5, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    plain = nn.QuantizedLinear.from_linear(linear, 64, 4)
    assert errors[2] < relative(plain(x), linear(x)) / 2


@pytest.mark.parametrize("clusters", [2, 3, 8])
def test_split_conv_net_computes_the_same_and_quantizes(clusters):
    mx.random.seed(3)
    model = ConvNet()
    x = mx.random.normal((2, 12, 12, 3))
    expected = model(x)
    weights = {name: m.weight for name, m in model.named_modules() if "weight" in m}
    split_model(model, clusters)
    assert relative(model(x), expected) < 1e-5
    assert isinstance(model.stem, SplitConv) and isinstance(model.head, SplitLinear)
    for name in ("stem", "depthwise", "grouped", "sequence"):
        parts = model[name].parts
        assert len(parts) == clusters
        total = reduce(mx.add, parts)
        assert np.array_equal(
            np.array(total.view(mx.uint32)), np.array(weights[name].view(mx.uint32))
        )
    with pytest.raises(RecipeError, match=r"head: group_size 64 does not divide the width 24"):
        quantize_split_layers(model)


def test_quantized_conv_net_stays_close():
    mx.random.seed(4)
    model = ConvNet()
    x = mx.random.normal((2, 12, 12, 3))
    expected = model(x)
    split_model(model, predicate=lambda path, module: path != "head")
    assert type(model.head) is nn.Linear
    quantize_split_layers(model, bits=8)
    assert isinstance(model.stem, QuantizedSplitConv)
    assert relative(model(x), expected) < 0.01
    assert model.stem.weight.dtype == mx.uint32


def test_kernels_are_clustered_separately():
    """A kernel of small weights next to one of large weights still has three non-zero parts."""
    conv = nn.Conv2d(4, 2, 3)
    conv.weight = mx.random.normal(conv.weight.shape) * mx.array([1.0, 1000.0]).reshape(2, 1, 1, 1)
    parts = SplitConv.from_conv(conv).parts
    for kernel in range(2):
        assert all(mx.any(part[kernel] != 0).item() for part in parts)


def test_bfloat16_layers_keep_bfloat16_scales():
    linear = nn.Linear(64, 64)
    linear.set_dtype(mx.bfloat16)
    assert SplitLinear.from_linear(linear).to_quantized().scales.dtype == mx.bfloat16
    linear.set_dtype(mx.float32)
    assert SplitLinear.from_linear(linear).to_quantized().scales.dtype == mx.float16
