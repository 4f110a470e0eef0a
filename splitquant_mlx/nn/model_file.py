"""Run a SplitQuant checkpoint: the one file that such a checkpoint carries with it.

mlx-lm builds a model from a checkpoint's own Python file when config.json names one as
`model_file` and the user passes --trust-remote-code, and so does mlx-vlm, without a flag; this
file is copied there, with `build_model` in it, so it imports nothing but mlx. splitquant-mlx
itself builds the model from its own, installed, copy.

A split layer holds the codes of its k parts side by side along the input axis, which makes it a
quantized linear layer of k * in inputs. Fed with k copies of x it returns the sum over the parts,
accumulated in float32, in one kernel call: y = sum_c x @ dequantize(part_c).T + bias.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace
from mlx.utils import tree_unflatten

from splitquant_mlx.nn.build_model import build_model


class QuantizedSplitLinear(nn.Module):
    """Apply the quantized parts of a split linear layer to the input, and sum.

    Parameters are `weight` (out, clusters * in * bits / 32) uint32, `scales` and `biases`
    (out, clusters * in / group_size), and, where the layer has one, `bias` (out,).

    Args:
        input_dims: in, a multiple of `group_size`.
        output_dims: out.
        bias: whether the layer has a bias; it is whole, not split.
        clusters: number of parts.
        group_size: inputs of one part that share a scale and a bias.
        bits: bits of a code.

    Attributes:
        group: ranks to sum the outputs over, where each holds but some of every part's inputs;
            None for a whole layer, and for one of which each rank holds some outputs.
    """

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        bias: bool = True,
        *,
        clusters: int = 3,
        group_size: int = 64,
        bits: int = 4,
    ):
        super().__init__()
        self.clusters = clusters
        self.group_size = group_size
        self.bits = bits
        self.mode = "affine"
        self.group: mx.distributed.Group | None = None
        self.weight = mx.zeros((output_dims, clusters * input_dims * bits // 32), mx.uint32)
        self.scales = mx.zeros((output_dims, clusters * input_dims // group_size))
        self.biases = mx.zeros((output_dims, clusters * input_dims // group_size))
        if bias:
            self.bias = mx.zeros((output_dims,))
        self.freeze()

    def _extra_repr(self) -> str:
        *_, out, words = self.weight.shape
        return (
            f"input_dims={words * 32 // self.bits // self.clusters}, output_dims={out}, "
            f"bias={'bias' in self}, clusters={self.clusters}, group_size={self.group_size}, "
            f"bits={self.bits}"
        )

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., in) to (..., out) in the dtype of x."""
        y = mx.quantized_matmul(
            mx.tile(x, (1,) * (x.ndim - 1) + (self.clusters,)),
            self["weight"],
            scales=self["scales"],
            biases=self["biases"],
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
        ).astype(x.dtype)
        if self.group is not None:
            y = mx.distributed.all_sum(y, group=self.group)
        return y + self["bias"] if "bias" in self else y


class QuantizedSplitSwitchLinear(QuantizedSplitLinear):
    """Apply split linear layers, one for each expert, each token to the experts it is sent to.

    Parameters are those of `QuantizedSplitLinear` with an axis of experts before the others.

    Args:
        num_experts: number of experts.
        *sizes: as of `QuantizedSplitLinear`: input_dims, output_dims, bias.
        **settings: the same: clusters, group_size, bits.
    """

    def __init__(self, num_experts: int, *sizes: int, **settings: int):
        super().__init__(*sizes, **settings)  # type: ignore[arg-type]
        stacked = {k: mx.zeros((num_experts, *v.shape), v.dtype) for k, v in self.items()}
        self.update(stacked)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map x (..., 1, in) to (..., 1, out), by the experts `indices` (...), in x's dtype."""
        y = mx.gather_qmm(
            mx.tile(x, (1,) * (x.ndim - 1) + (self.clusters,)),
            self["weight"],
            self["scales"],
            self["biases"],
            rhs_indices=indices,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            sorted_indices=sorted_indices,
        ).astype(x.dtype)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


def split_layer(_: str, linear: nn.Module | None, settings: dict) -> QuantizedSplitLinear | None:
    """Return an empty split layer in the place of `linear`; None where that is no linear layer."""
    is_stack = type(linear).__name__ == "SwitchLinear"  # mlx-lm's, or mlx-vlm's own
    if linear is None or not (is_stack or type(linear) is nn.Linear):
        return None
    *experts, output_dims, input_dims = linear["weight"].shape
    sizes = (*experts, input_dims, output_dims, "bias" in linear)
    kind: type = QuantizedSplitSwitchLinear if is_stack else QuantizedSplitLinear
    return kind(*sizes, **settings)


class Sharded(nn.Module):
    """Divide a model's split layers among ranks where mlx-lm's `shard` divides the model.

    `shard` takes a split layer for a quantized one of clusters * in inputs. That suits its rows,
    the outputs. Its columns would be cut across the parts: they are cut again, each part into as
    many pieces as there are ranks, so that a rank has the same inputs of every part.
    """

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Keep of every layer what this rank computes; nothing is read or evaluated.

        Raises:
            ValueError: when a layer's outputs, or its inputs in whole groups, cannot be divided.
        """
        group = group or mx.distributed.init()
        whole: list[tuple[str, QuantizedSplitLinear, dict]] = [
            (path, layer, layer.parameters())  # type: ignore[misc]
            for path, layer in self.named_modules()
            if isinstance(layer, QuantizedSplitLinear)
        ]
        super().shard(group)  # type: ignore[misc]
        sharded = dict(self.named_modules())
        for path, layer, parameters in whole:
            found = sharded[path]
            if found.weight.shape[-1] == parameters["weight"].shape[-1]:
                layer.update(found.parameters())
                continue
            layer.update(parameters)
            shard_inplace(layer, "sharded-to-all", segments=layer.clusters, group=group)
            # a layer that was sharded in place is summed by the module around it
            layer.group = None if found is layer else group
        self.update_modules(tree_unflatten([(path, layer) for path, layer, _ in whole]))


def Model(args: Any) -> nn.Module:
    """Build the model of the program that runs this, with split layers in place."""
    return build_model(args, split_layer, Sharded)
