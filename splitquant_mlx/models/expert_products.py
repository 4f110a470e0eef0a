"""Multiply by the experts that tokens are routed to, one after the other."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np


def expert_products(
    x: mx.array, indices: mx.array, multiply: Callable[[mx.array, int], Any]
) -> mx.array:
    """Return x (..., 1, in) times the weights of the experts `indices` (...): (..., 1, out).

    Args:
        x: the inputs, which may have axes of 1 where `indices` has more.
        indices: the experts, which are looked at.
        multiply: returns rows (n, in), float32, times the weight of an expert.
    """
    routes = np.array(indices).reshape(-1)
    order = np.argsort(routes, kind="stable")
    experts, starts = np.unique(routes[order], return_index=True)
    rows = mx.broadcast_to(x, (*indices.shape, 1, x.shape[-1])).reshape(-1, x.shape[-1])
    parts: Any = mx.split(rows[mx.array(order)].astype(mx.float32), starts[1:].tolist())
    found: list[Any] = [multiply(part, int(e)) for part, e in zip(parts, experts, strict=True)]
    y = mx.concatenate(found)[mx.array(np.argsort(order))]
    return y.reshape(*indices.shape, 1, -1)


@mx.custom_function
def product(rows: mx.array, w: mx.array) -> mx.array:
    """Return rows (n, in) times the transpose of w (out, in), which is of any type."""
    return rows @ w.astype(mx.float32).T


@product.vjp
def _gradient(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    """Widen the weight anew, so that it is not kept until the gradient is asked for."""
    _, w = primals
    return cotangent @ w.astype(mx.float32), mx.zeros_like(w)
