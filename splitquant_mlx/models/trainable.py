"""Quantized layers with trainable scales and biases."""

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.models.expert_products import expert_products

WIDE = 1 << 24  # weights that are dequantized at a time


class TrainableLinear(nn.Module):
    """Quantized linear layer with trainable scales and biases.

    Attributes:
        u, v: trained parameters (..., out, in / group_size), steps of the grid.
    """

    def __init__(self, layer: Any):
        super().__init__()
        self._codes, self._bias = _codes(layer), layer.get("bias")
        self._scales = layer.scales.astype(mx.float32)
        self._biases = layer["biases"].astype(mx.float32)
        self._middle = (2**layer.bits - 1) / 2
        self._product, self._backward = _product(layer.group_size, layer.bits)
        self.u = mx.zeros(self._scales.shape)
        self.v = mx.zeros(self._scales.shape)

    def trained(self) -> tuple[mx.array, mx.array]:
        """Return scales and biases (..., out, in / group_size), float32."""
        scales = self._scales * (1 + self.u / self._middle)
        return scales, self._biases + self._scales * (self.v - self.u)

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., in) to (..., out)."""
        rows = max(1, WIDE // x.shape[-1])
        starts = list(range(rows, len(self._codes), rows))
        pieces = (mx.split(array, starts) for array in (self._codes, *self.trained()))
        y = mx.concatenate([self._product(x, *own) for own in zip(*pieces, strict=True)], axis=-1)
        return y if self._bias is None else y + self._bias


class TrainableSwitchLinear(TrainableLinear):
    """Quantized stack of experts with trainable scales and biases (experts, out, groups)."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map x (..., 1, in) to (..., 1, out) with the experts `indices` (...)."""
        y = self._products(indices)(x, *self.trained())
        return y if self._bias is None else y + mx.expand_dims(self._bias[indices], -2)

    def _products(self, indices: mx.array) -> Any:
        """Return a function of x, scales and biases that computes one expert at a time."""

        def weight_of(scales: mx.array, biases: mx.array, expert: int) -> list[mx.array]:
            return [self._codes[expert], scales[expert], biases[expert]]

        @mx.custom_function
        def products(x: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
            x, scales, biases = map(_constant, (x, scales, biases))

            def multiply(rows: mx.array, expert: int) -> mx.array:
                return _constant(self._product(rows, *weight_of(scales, biases, expert)))

            return expert_products(x, indices, multiply)

        @products.vjp
        def gradients(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
            x, scales, biases = map(_constant, primals)
            width = x.shape[-1]
            rows = mx.broadcast_to(x, (*cotangent.shape[:-1], width))
            totals = [list(mx.zeros_like(array)) for array in (scales, biases)]

            def backward(rows: mx.array, expert: int) -> mx.array:
                inputs, cotangents = mx.split(rows, [width], axis=-1)
                weight = weight_of(scales, biases, expert)
                of_x, *trained = map(_constant, self._backward(inputs, *weight, cotangents))
                for of_all, of_expert in zip(totals, trained, strict=True):
                    of_all[expert] = of_expert
                return of_x

            both = mx.concatenate([rows, _constant(cotangent)], axis=-1)
            of_x = expert_products(both, indices, backward)
            shared = [axis for axis, size in enumerate(x.shape) if size != of_x.shape[axis]]
            return of_x.sum(shared, keepdims=True), *(mx.stack(of_all) for of_all in totals)

        return products


def _constant(x: mx.array) -> mx.array:
    """Return a copy of an array without its graph, which mlx retains inside a vjp."""
    return mx.array(np.array(x))


def _codes(layer: Any) -> mx.array:
    """Return a layer's codes: packed, or on the CPU, where mlx unpacks slowly, uint8 (out, in).

    The codes of experts stay packed, as most of them are not used in a step.
    """
    packed = layer.weight
    if mx.default_device() != mx.cpu or packed.ndim > 2:
        return packed
    groups, pieces = layer.scales.shape[1], []
    rows = max(1, WIDE // (groups * layer.group_size))
    for start in range(0, len(packed), rows):
        piece = packed[start : start + rows]
        ones = mx.ones((len(piece), groups), mx.bfloat16)
        q = mx.dequantize(piece, ones, mx.zeros_like(ones), layer.group_size, layer.bits)
        pieces.append(q.astype(mx.uint8))  # integers up to 255 are exact in bfloat16
        mx.eval(pieces)
    return mx.concatenate(pieces)


@cache
def _product(group_size: int, bits: int) -> tuple[Any, Any]:
    """Return the quantized product of x, `_codes`, scales and biases, and its vjp.

    The product is differentiable in all but the codes. The vjp dequantizes the weight again, so
    that one piece at a time is in memory. mlx's own quantized product is slow on the CPU.
    """

    def integers(codes: mx.array, scales: mx.array) -> mx.array:
        if codes.dtype != mx.uint8:
            ones = mx.ones_like(scales)
            codes = mx.dequantize(codes, ones, mx.zeros_like(ones), group_size, bits)
        return codes.astype(mx.float32).reshape(*scales.shape, group_size)

    def dense(codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        if codes.dtype != mx.uint8:
            return mx.dequantize(codes, scales, biases, group_size, bits)
        return grid(integers(codes, scales), scales, biases)

    def grid(q: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return (q * scales[..., None] + biases[..., None]).flatten(-2)

    @mx.custom_function
    def product(x: mx.array, codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return x @ dense(codes, scales, biases).T

    def backward(
        x: mx.array, codes: mx.array, scales: mx.array, biases: mx.array, cotangent: mx.array
    ) -> tuple[mx.array, ...]:
        rows, out = (array.reshape(-1, array.shape[-1]) for array in (x, cotangent))
        of_weight = (out.T @ rows).reshape(*scales.shape, group_size)
        q = integers(codes, scales)
        of_x = cotangent @ grid(q, scales, biases)
        return of_x, (of_weight * q).sum(-1), of_weight.sum(-1)

    @product.vjp
    def gradients(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        x, codes, scales, biases = primals
        of_x, *trained = backward(x, codes, scales, biases, cotangent)
        return of_x, mx.zeros_like(codes), *trained

    return product, backward
