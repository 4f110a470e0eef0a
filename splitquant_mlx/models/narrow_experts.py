"""Multiply by stacks of experts one expert after the other, each widened to float32 by itself.

On the CPU mlx's 16-bit products are slow, and a block's experts in float32 may be larger than all
else in memory: 2.4 GB of Qwen3-30B-A3B's, where the experts that are being multiplied by are a few.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear


class NarrowSwitchLinear(SwitchLinear):
    """A stack of experts that stays in its own type; results are in float32.

    Args:
        stack: whose parameters these are.
    """

    def __init__(self, stack: SwitchLinear):
        nn.Module.__init__(self)
        self.weight = stack.weight
        if "bias" in stack:
            self.bias = stack.bias

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map x (..., 1, in) to (..., 1, out) by the experts `indices` (...)."""
        return self.times(x, indices, lambda expert: self.weight[expert])

    def times(self, x: mx.array, indices: mx.array, weight: Callable[[int], mx.array]) -> mx.array:
        """Do as the layer does, with other weights; see `expert_products`."""
        y = expert_products(x, indices, weight)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


def keep_experts_narrow(model: nn.Module) -> set[str]:
    """Replace, in place, all stacks of experts; returns the names of their weights."""
    stacks = {p: m for p, m in model.named_modules() if type(m) is SwitchLinear}
    narrow = [(path, NarrowSwitchLinear(stack)) for path, stack in stacks.items()]
    model.update_modules(tree_unflatten(narrow))
    return {f"{path}.weight" for path in stacks}


def expert_products(x: mx.array, indices: mx.array, weight: Callable[[int], mx.array]) -> mx.array:
    """Return x (..., 1, in) times the weights of the experts `indices` (...): (..., 1, out).

    Args:
        x: the inputs, which may have axes of 1 where `indices` has more.
        indices: the experts, which are looked at.
        weight: returns the weight (out, in) of an expert, of any float type; results are float32.
    """
    routes = np.array(indices).reshape(-1)
    order = np.argsort(routes, kind="stable")
    experts, starts = np.unique(routes[order], return_index=True)
    rows = mx.broadcast_to(x, (*indices.shape, 1, x.shape[-1])).reshape(-1, x.shape[-1])
    parts: Any = mx.split(rows[mx.array(order)].astype(mx.float32), starts[1:].tolist())
    found: list[Any] = [
        _product(part, weight(int(e))) for part, e in zip(parts, experts, strict=True)
    ]
    y = mx.concatenate(found)[mx.array(np.argsort(order))]
    return y.reshape(*indices.shape, 1, -1)


@mx.custom_function
def _product(rows: mx.array, w: mx.array) -> mx.array:
    return rows @ w.astype(mx.float32).T


@_product.vjp
def _gradient(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    """Widen the weight anew, so that it is not kept until the gradient is asked for."""
    _, w = primals
    return cotangent @ w.astype(mx.float32), mx.zeros_like(w)
