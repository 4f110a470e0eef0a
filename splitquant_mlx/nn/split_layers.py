"""Split the layers of any mlx.nn model in memory, and quantize the split layers.

    model = split_model(model)                     # same function, k parts per layer
    model = quantize_split_layers(model, bits=4)   # quantized parts

`SplitLinear` and `SplitConv` compute the same function as the layer they are made from. Their
`to_quantized` returns the quantized layer, as in mlx.nn.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.nn.split_model_file import QuantizedSplitLinear
from splitquant_mlx.quantization.affine import Quantized, dequantize, quantize_parts
from splitquant_mlx.quantization.split import split


class SplitLinear(nn.Module):
    r"""Linear layer split into k parts: :math:`y = \sum_c x W_c^\top + b`.

    The parts are concatenated along the input axis, so that one matrix product with k copies of x
    sums over them.

    Args:
        parts: k arrays (out, in) that sum to the weight.
        bias: (out,), not split, or None.
    """

    def __init__(self, parts: list[mx.array], bias: mx.array | None = None):
        super().__init__()
        self.clusters = len(parts)
        self.weight = mx.concatenate(parts, axis=-1)  # (out, clusters * in)
        if bias is not None:
            self.bias = bias

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, clusters: int = 3, kmeans: str = "exact"
    ) -> "SplitLinear":
        """Split a linear layer's weight into `clusters` parts; see `split`."""
        return cls(split(linear.weight, clusters, kmeans), linear.get("bias"))

    @property
    def parts(self) -> list[mx.array]:
        """Return the k parts, (out, in) each."""
        return list(mx.split(self.weight, self.clusters, axis=-1))

    def _extra_repr(self) -> str:
        out, width = self.weight.shape
        return (
            f"input_dims={width // self.clusters}, output_dims={out}, bias={'bias' in self}, "
            f"clusters={self.clusters}"
        )

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., in) to (..., out)."""
        y = mx.tile(x, (1,) * (x.ndim - 1) + (self.clusters,)) @ self["weight"].T
        return y + self["bias"] if "bias" in self else y

    def to_quantized(
        self, group_size: int = 64, bits: int = 4, granularity: str = "group"
    ) -> QuantizedSplitLinear:
        """Quantize every part. Raises RecipeError if `group_size` does not divide `in`."""
        quantized = quantize_parts(
            self.parts,
            bits=bits,
            group_size=group_size,
            granularity=granularity,
            scale_dtype=scale_dtype(self.weight.dtype),
        )
        out, width = self.weight.shape
        layer = QuantizedSplitLinear(
            width // self.clusters,
            out,
            "bias" in self,
            clusters=self.clusters,
            group_size=group_size,
            bits=bits,
        )
        layer.update(quantized._asdict())
        if "bias" in self:
            layer.bias = self.bias
        return layer


class SplitConv(nn.Module):
    """Convolution split into k parts, each output kernel clustered separately.

    Replaces nn.Conv1d and nn.Conv2d. The parts sum to the kernel exactly, so they are summed
    before the convolution, which runs once.

    Args:
        parts: k arrays (out, ..., in), the shape of the convolution's weight.
        convolve: maps x and a weight to the output without bias.
        bias: (out,), not split, or None.
    """

    def __init__(
        self,
        parts: list[mx.array],
        convolve: Callable[[mx.array, mx.array], mx.array],
        bias: mx.array | None = None,
    ):
        super().__init__()
        self.clusters = len(parts)
        self.weight = mx.stack(parts)  # (clusters, out, ..., in)
        self._convolve = convolve
        if bias is not None:
            self.bias = bias

    @classmethod
    def from_conv(
        cls, conv: nn.Conv1d | nn.Conv2d, clusters: int = 3, kmeans: str = "exact"
    ) -> "SplitConv":
        """Split each output kernel of a convolution into `clusters` parts; see `split`."""
        kernels = [split(kernel, clusters, kmeans) for kernel in conv.weight]
        parts = [mx.stack(list(kernel_parts)) for kernel_parts in zip(*kernels, strict=True)]
        return cls(parts, _convolution(conv), conv.get("bias"))

    @property
    def parts(self) -> list[mx.array]:
        """Return the k parts, (out, ..., in) each."""
        return list(self.weight)

    def _extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape[1:])}, clusters={self.clusters}"

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve x (batch, ..., in)."""
        y = self._convolve(x, sum_parts(self.parts))
        return y + self["bias"] if "bias" in self else y

    def to_quantized(
        self, group_size: int = 64, bits: int = 4, granularity: str = "group"
    ) -> "QuantizedSplitConv":
        """Quantize every part; kernels are padded with zeros to a multiple of `group_size`."""
        return QuantizedSplitConv(self, group_size, bits, granularity)


class QuantizedSplitConv(nn.Module):
    """Split convolution with quantized parts, dequantized in each call.

    mlx has no quantized convolution. Each output kernel is flattened to one row and padded with
    zeros to a multiple of `group_size`. The k parts are concatenated along the row.
    """

    def __init__(self, conv: SplitConv, group_size: int, bits: int, granularity: str):
        super().__init__()
        self.clusters, self.group_size, self.bits = conv.clusters, group_size, bits
        self._convolve = conv._convolve
        self._shape = tuple(conv.weight.shape[1:])
        entries = math.prod(self._shape[1:])
        pad = -entries % group_size
        rows = [mx.pad(part.reshape(-1, entries), [(0, 0), (0, pad)]) for part in conv.parts]
        self.weight, self.scales, self.biases = quantize_parts(
            rows,
            bits=bits,
            group_size=group_size,
            granularity=granularity,
            scale_dtype=scale_dtype(conv.weight.dtype),
        )
        if "bias" in conv:
            self.bias = conv.bias
        self.freeze()

    def _extra_repr(self) -> str:
        return (
            f"shape={self._shape}, clusters={self.clusters}, group_size={self.group_size}, "
            f"bits={self.bits}"
        )

    def __call__(self, x: mx.array) -> mx.array:
        """Convolve x (batch, ..., in)."""
        w = dequantize(
            Quantized(self["weight"], self["scales"], self["biases"]),
            bits=self.bits,
            group_size=self.group_size,
        )
        out = self._shape[0]
        w = w.reshape(out, self.clusters, -1)[..., : math.prod(self._shape[1:])].sum(axis=1)
        y = self._convolve(x, w.reshape(self._shape).astype(x.dtype))
        return y + self["bias"] if "bias" in self else y


def split_model(
    model: nn.Module,
    clusters: int = 3,
    *,
    kmeans: str = "exact",
    predicate: Callable[[str, nn.Module], bool] = lambda path, module: True,
) -> nn.Module:
    """Replace, in place, every Linear, Conv1d and Conv2d of `model` by its split form.

    Args:
        model: any mlx.nn model.
        clusters: parts per layer, 2 to 8.
        kmeans: "exact" or "sklearn".
        predicate: called with path and module; returns False for layers not to split.

    Returns:
        `model`, which computes the same function.
    """

    def replace(module: nn.Module) -> nn.Module | None:
        if type(module) is nn.Linear:
            return SplitLinear.from_linear(module, clusters, kmeans)
        if type(module) is nn.Conv1d or type(module) is nn.Conv2d:
            return SplitConv.from_conv(module, clusters, kmeans)
        return None

    return _replace_modules(model, lambda path, m: replace(m) if predicate(path, m) else None)


def quantize_split_layers(
    model: nn.Module, *, bits: int = 4, group_size: int = 64, granularity: str = "group"
) -> nn.Module:
    """Replace, in place, every split layer of `model` by its quantized form.

    Raises:
        RecipeError: `group_size` does not divide the inputs of a linear layer, which is named.
    """

    def replace(path: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, (SplitLinear, SplitConv)):
            return None
        try:
            return module.to_quantized(group_size, bits, granularity)
        except RecipeError as exc:
            raise RecipeError(f"{path}: {exc}") from exc

    return _replace_modules(model, replace)


def scale_dtype(weight_dtype: mx.Dtype) -> mx.Dtype | None:
    """Return the dtype of a split layer's scales; None: the better fitting 16-bit dtype.

    A bfloat16 model needs bfloat16: mlx's kernels expect activations and scales of one dtype.
    """
    return mx.bfloat16 if weight_dtype == mx.bfloat16 else None


def sum_parts(parts: list[mx.array]) -> mx.array:
    """Return the sum of `parts`; unlike `sum`, which starts from 0, it preserves every -0.0."""
    return reduce(mx.add, parts)


def _replace_modules(
    model: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    replaced = [
        (path, new)
        for path, module in model.named_modules()
        if path and (new := replace(path, module)) is not None
    ]
    model.update_modules(tree_unflatten(replaced))
    return model


def _convolution(conv: nn.Conv1d | nn.Conv2d) -> Callable[[mx.array, mx.array], mx.array]:
    convolve: Any = mx.conv1d if isinstance(conv, nn.Conv1d) else mx.conv2d
    stride, padding, dilation, groups = conv.stride, conv.padding, conv.dilation, conv.groups
    return lambda x, w: convolve(x, w, stride, padding, dilation, groups)
