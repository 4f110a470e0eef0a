"""Model file of checkpoints with split layers.

mlx-lm builds a model from the Python file that config.json names as `model_file` if the user
passes --trust-remote-code; mlx-vlm needs no flag. This file, with `build_model` inlined, is written
into the checkpoint, so it imports only mlx. splitquant-mlx uses its installed copy instead.

A split layer stores the codes of its k parts concatenated along the input axis, as a quantized
linear layer of k * in inputs. Applied to k copies of x, it returns the sum over the parts,
accumulated in float32, in one kernel call: y = sum_c x @ dequantize(part_c).T + bias.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace
from mlx.utils import tree_unflatten

from splitquant_mlx.nn.build_model import build_model


class QuantizedSplitLinear(nn.Module):
    """Linear layer that sums the products of x with k quantized parts.

    Parameters: `weight` (out, clusters * in * bits / 32) uint32, `scales` and `biases`
    (out, clusters * in / group_size), and optionally `bias` (out,).

    Args:
        input_dims: in, a multiple of `group_size`.
        output_dims: out.
        bias: whether the layer has a bias, which is not split.
        clusters: number of parts.
        group_size: inputs of one part that share a scale and a bias.
        bits: bits per code.

    Attributes:
        group: ranks to sum the outputs over, if the layer is sharded along its inputs; None if it
            is not sharded, or sharded along its outputs.
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
    """Split linear layers of a mixture of experts, applied to each token by expert index.

    Parameters: those of `QuantizedSplitLinear` with a leading axis (num_experts,).

    Args:
        num_experts: number of experts.
        *sizes: input_dims, output_dims and bias of `QuantizedSplitLinear`.
        **settings: clusters, group_size and bits of `QuantizedSplitLinear`.
    """

    def __init__(self, num_experts: int, *sizes: int, **settings: int):
        super().__init__(*sizes, **settings)  # type: ignore[arg-type]
        stacked = {k: mx.zeros((num_experts, *v.shape), v.dtype) for k, v in self.items()}
        self.update(stacked)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Map x (..., 1, in) to (..., 1, out) with experts `indices` (...), in the dtype of x."""
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
    """Return an uninitialized split layer of the shape of `linear`; None if not a linear layer."""
    is_stack = type(linear).__name__ == "SwitchLinear"  # of mlx-lm or mlx-vlm
    if linear is None or not (is_stack or type(linear) is nn.Linear):
        return None
    *experts, output_dims, input_dims = linear["weight"].shape
    sizes = (*experts, input_dims, output_dims, "bias" in linear)
    layer_class: type = QuantizedSplitSwitchLinear if is_stack else QuantizedSplitLinear
    return layer_class(*sizes, **settings)


class Sharded(nn.Module):
    """Mixin that shards split layers where mlx-lm's `shard` shards the model.

    To `shard`, a split layer is a quantized layer of clusters * in inputs. Sharding along the
    outputs is correct as it is. Sharding along the inputs would mix inputs of different parts, so
    it is done again part by part: a rank then has the same inputs of every part.
    """

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Reduce every layer to the shard of this rank, lazily.

        Raises:
            ValueError: when the ranks do not divide a layer's outputs, or its groups of inputs.
        """
        group = group or mx.distributed.init()
        unsharded: list[tuple[str, QuantizedSplitLinear, dict]] = [
            (path, layer, layer.parameters())  # type: ignore[misc]
            for path, layer in self.named_modules()
            if isinstance(layer, QuantizedSplitLinear)
        ]
        super().shard(group)  # type: ignore[misc]
        sharded = dict(self.named_modules())
        for path, layer, parameters in unsharded:
            shard = sharded[path]
            if shard.weight.shape[-1] == parameters["weight"].shape[-1]:
                layer.update(shard.parameters())
                continue
            layer.update(parameters)
            shard_inplace(layer, "sharded-to-all", segments=layer.clusters, group=group)
            # the parent module sums the outputs of a layer that was sharded in place
            layer.group = None if shard is layer else group
        self.update_modules(tree_unflatten([(path, layer) for path, layer, _ in unsharded]))


def Model(args: Any) -> nn.Module:
    """Build the model of mlx-lm or mlx-vlm with split layers."""
    return build_model(args, split_layer, Sharded)
