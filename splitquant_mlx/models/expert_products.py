"""Multiply inputs by the weights of the experts that they are routed to, one expert at a time."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np


def expert_products(
    x: mx.array, indices: mx.array, multiply: Callable[[mx.array, int], Any]
) -> mx.array:
    """Return products (..., 1, out) of inputs and the weights of their experts.

    Args:
        x: inputs (..., 1, in), broadcast to the axes of `indices`.
        indices: the expert of each input (...), which are evaluated.
        multiply: returns the product of float32 rows (n, in) and the weight of an expert.
    """
    routes = np.array(indices).reshape(-1)
    order = np.argsort(routes, kind="stable")
    experts, starts = np.unique(routes[order], return_index=True)
    rows = mx.broadcast_to(x, (*indices.shape, 1, x.shape[-1])).reshape(-1, x.shape[-1])
    parts: Any = mx.split(rows[mx.array(order)].astype(mx.float32), starts[1:].tolist())
    products: list[Any] = [multiply(part, int(e)) for part, e in zip(parts, experts, strict=True)]
    y = mx.concatenate(products)[mx.array(np.argsort(order))]
    return y.reshape(*indices.shape, 1, -1)


@mx.custom_function
def product(rows: mx.array, w: mx.array) -> mx.array:
    """Return rows (n, in) times the transpose of w (out, in), whose dtype may be any."""
    return rows @ w.astype(mx.float32).T


@product.vjp
def _gradient(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    """Convert the weight again, so that its float32 copy is not retained for the gradient."""
    _, w = primals
    return cotangent @ w.astype(mx.float32), mx.zeros_like(w)
