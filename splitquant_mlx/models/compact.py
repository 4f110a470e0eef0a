"""8-bit copy of a model for sampling text, with a quarter of the memory of float32.

On a GPU the layers are mlx's quantized ones. On the CPU mlx's quantized matmul runs at 1 % of the
speed of the dense one, so there each layer stores int8 codes with one scale per row and converts
them to float32 in every call: 0.2 ns per weight, compared with 6 ns for the matmul of 128 rows.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from splitquant_mlx.models.expert_products import expert_products, product
from splitquant_mlx.runtime.blas import release_freed_memory

BITS = 8
GROUP_SIZE = 64
SMALL = 1 << 10  # weights of a layer that is not replaced: Gemma 3n modifies some of its own
SLICE = 1 << 22  # weights converted to float32 at a time by each core


def compact(model: nn.Module) -> nn.Module:
    """Replace the layers of a lazily loaded model by 8-bit ones, in place and one at a time."""
    from splitquant_mlx.models.narrow_experts import keep_expert_dtype, to_float32

    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        keep_expert_dtype(model)
    replaced: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized") or module["weight"].ndim < 2:
            continue
        if module["weight"].size <= SMALL:
            continue
        if on_cpu:
            layer_class = _CompactEmbedding if isinstance(module, nn.Embedding) else _Compact
            layer: nn.Module = layer_class(module)
        elif module["weight"].shape[-1] % GROUP_SIZE == 0:
            layer = module.to_quantized(group_size=GROUP_SIZE, bits=BITS)
        else:
            continue
        mx.eval(layer.parameters())
        replaced.append((path, layer))
        module.pop("weight")  # free its memory
    model.update_modules(tree_unflatten(replaced))
    if on_cpu:
        to_float32(model, experts=True)
    mx.eval(model.parameters())
    release_freed_memory()
    return model


class _Compact(nn.Module):
    """A layer whose weight (..., out, in) is stored as int8 codes and scales (..., out, 1)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        w = layer["weight"]
        if w.ndim == 2:
            self.codes, self.scales = _quantize(w)
        else:
            quantized = [_quantize(expert) for expert in w]
            self.codes, self.scales = (mx.stack(list(x)) for x in zip(*quantized, strict=True))
        self._layer = layer

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Call the layer with its weight dequantized."""
        if self.codes.ndim == 2:
            y = self._product(x)
            return y if "bias" not in self._layer else y + self._layer["bias"]
        with_bias: Any = getattr(self._layer, "with_bias", None)
        if with_bias is not None:  # a stack of experts
            indices = args[0] if args else kwargs["indices"]
            y = expert_products(x, indices, lambda rows, e: product(rows, self.codes[e]))
            return with_bias(y * self.scales[indices].swapaxes(-1, -2), indices)
        self._layer.weight = self.codes.astype(mx.float32) * self.scales
        y = self._layer(x, *args, **kwargs)
        self._layer.pop("weight")
        return y

    def _product(self, x: mx.array) -> mx.array:
        rows = max(1, SLICE // self.codes.shape[1])
        pieces: list[mx.array] = []
        for start in range(0, len(self.codes), rows):
            codes, scales = (array[start : start + rows] for array in (self.codes, self.scales))
            if pieces:  # converted after the previous product, so that few are in memory
                codes = mx.depends([codes], [pieces[-1]])[0]
            pieces.append(x @ codes.astype(mx.float32).T * scales[:, 0])
        return mx.concatenate(pieces, axis=-1)


def _quantize(w: mx.array) -> tuple[mx.array, mx.array]:
    """Return int8 codes and scales of a weight (out, in), evaluated."""
    rows = max(1, SLICE // w.shape[1])
    if len(w) > rows:
        pieces = [_quantize(w[start : start + rows]) for start in range(0, len(w), rows)]
        codes, scales = (mx.concatenate(list(x)) for x in zip(*pieces, strict=True))
        mx.eval(codes, scales)
        return codes, scales
    w = w.astype(mx.float32)
    scales = mx.maximum(mx.abs(w).max(axis=-1, keepdims=True), 1e-30) / 127
    codes = mx.round(w / scales).astype(mx.int8)
    mx.eval(codes, scales)
    return codes, scales


class _CompactEmbedding(_Compact):
    """An embedding, possibly tied to the output head."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Return the float32 embeddings of tokens."""
        return self.codes[x].astype(mx.float32) * self.scales[x]

    def as_linear(self, x: mx.array) -> mx.array:
        """Return logits."""
        return self._product(x)
