"""A copy of a model in 8 bits, to sample text from: a quarter of the memory of float32.

On a GPU its layers are mlx's own quantized ones. On the CPU mlx's quantized product runs at 1 % of
the speed of the dense one, so there each layer keeps int8 codes with one scale per row, and widens
them whenever it is called: 0.2 ns per weight, against 6 ns of the product with 128 rows.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from splitquant_mlx.models.expert_products import expert_products, product

BITS = 8
GROUP_SIZE = 64
SMALL = 1 << 10  # weights of a layer that stays as it is: Gemma 3n changes some of its own
SLICE = 1 << 20  # weights that are wide at a time, so that they stay in a core's cache


def compact(model: nn.Module) -> nn.Module:
    """Replace, in place, the layers of a lazily loaded model by 8-bit ones, one after the other.

    What of it was widened already is in memory wide while it is coded.
    """
    from splitquant_mlx.models.narrow_experts import keep_experts_narrow, widen

    on_cpu = mx.default_device() == mx.cpu
    if on_cpu:
        keep_experts_narrow(model)
    replaced: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized") or module["weight"].ndim < 2:
            continue
        if module["weight"].size <= SMALL:
            continue
        if on_cpu:
            layer: nn.Module = _CompactEmbedding(module) if _is_table(module) else _Compact(module)
        elif module["weight"].shape[-1] % GROUP_SIZE == 0:
            layer = module.to_quantized(group_size=GROUP_SIZE, bits=BITS)
        else:
            continue
        mx.eval(layer.parameters())
        replaced.append((path, layer))
        module.pop("weight")  # read for this layer alone
    model.update_modules(tree_unflatten(replaced))
    if on_cpu:
        widen(model, experts=True)
    mx.eval(model.parameters())
    return model


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


class _Compact(nn.Module):
    """A layer whose weight (..., out, in) is kept as int8 codes and scales (..., out, 1)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        w = layer["weight"]
        if w.ndim == 2:
            self.codes, self.scales = _coded(w)
        else:
            coded = [_coded(part) for part in w]
            self.codes, self.scales = (mx.stack(list(x)) for x in zip(*coded, strict=True))
        self._layer = layer

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Do as the layer does."""
        if self.codes.ndim == 2:
            y = self._product(x)
            return y if "bias" not in self._layer else y + self._layer["bias"]
        with_bias: Any = getattr(self._layer, "with_bias", None)
        if with_bias is not None:  # of a stack of experts
            indices = args[0] if args else kwargs["indices"]
            y = expert_products(x, indices, lambda rows, e: product(rows, self.codes[e]))
            return with_bias(y * self.scales[indices].swapaxes(-1, -2), indices)
        self._layer.weight = self.codes.astype(mx.float32) * self.scales
        y = self._layer(x, *args, **kwargs)
        self._layer.pop("weight")
        return y

    def _product(self, x: mx.array) -> mx.array:
        rows = max(1, SLICE // self.codes.shape[1])
        pieces = [
            x @ self.codes[start : start + rows].astype(mx.float32).T
            for start in range(0, len(self.codes), rows)
        ]
        return mx.concatenate(pieces, axis=-1) * self.scales[:, 0]


def _coded(w: mx.array) -> tuple[mx.array, mx.array]:
    """Return int8 codes and scales of a weight (out, in), evaluated."""
    rows = max(1, SLICE // w.shape[1])
    if len(w) > rows:
        pieces = [_coded(w[start : start + rows]) for start in range(0, len(w), rows)]
        codes, scales = (mx.concatenate(list(x)) for x in zip(*pieces, strict=True))
        mx.eval(codes, scales)
        return codes, scales
    w = w.astype(mx.float32)
    scales = mx.maximum(mx.abs(w).max(axis=-1, keepdims=True), 1e-30) / 127
    codes = mx.round(w / scales).astype(mx.int8)
    mx.eval(codes, scales)
    return codes, scales


class _CompactEmbedding(_Compact):
    """An embedding, which may be the output head too."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Look tokens up."""
        return self.codes[x].astype(mx.float32) * self.scales[x]

    def as_linear(self, x: mx.array) -> mx.array:
        """Return logits."""
        return self._product(x)
