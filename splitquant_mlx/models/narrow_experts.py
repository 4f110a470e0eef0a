"""Stacks of experts in 16 bits that are converted to float32 one expert at a time.

On the CPU mlx's 16-bit matmuls are slow, and a block's experts in float32 may be larger than
everything else in memory: 2.4 GB in Qwen3-30B-A3B, of which a call uses few at a time.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from splitquant_mlx.models.expert_products import expert_products, product


class PerExpertSwitchLinear(SwitchLinear):
    """A stack of experts whose parameters keep their dtype; results are float32.

    Args:
        stack: the layer whose parameters it uses.
    """

    def __init__(self, stack: SwitchLinear):
        nn.Module.__init__(self)
        self.weight = stack.weight
        if "bias" in stack:
            self.bias = stack.bias

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map x (..., 1, in) to (..., 1, out) by the experts `indices` (...)."""
        y = expert_products(x, indices, lambda rows, expert: product(rows, self.weight[expert]))
        return self.with_bias(y, indices)

    def with_bias(self, y: mx.array, indices: mx.array) -> mx.array:
        """Add the biases of the experts `indices` (...) to products (..., 1, out)."""
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


def keep_expert_dtype(model: nn.Module) -> set[str]:
    """Replace all stacks of experts in place; return the names of their weights."""
    stacks = {p: m for p, m in model.named_modules() if type(m) is SwitchLinear}
    replaced = [(path, PerExpertSwitchLinear(stack)) for path, stack in stacks.items()]
    model.update_modules(tree_unflatten(replaced))
    return {f"{path}.weight" for path in stacks}


def to_float32(model: nn.Module, *, experts: bool) -> None:
    """Convert 16-bit parameters to float32, lazily; stacks of experts only with `experts`."""
    kept = set() if experts else keep_expert_dtype(model)

    def convert(name: str, array: mx.array) -> mx.array:
        is_16_bit = array.dtype in (mx.float16, mx.bfloat16)
        return array.astype(mx.float32) if is_16_bit and name not in kept else array

    model.update(tree_map_with_path(convert, model.parameters()))
