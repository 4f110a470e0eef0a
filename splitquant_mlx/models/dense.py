"""Make quantized layers dense where that is the faster form.

On the CPU, mlx's quantized product runs at about 1 % of the speed of the dense one; the
dequantized weights give the same numbers to float rounding.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from splitquant_mlx.nn.model_file import QuantizedSplitLinear, QuantizedSplitSwitchLinear
from splitquant_mlx.nn.neighbour_file import LUTLinear, MixedLinear
from splitquant_mlx.quantization.affine import Quantized, dequantize


def for_scoring(model: nn.Module) -> nn.Module:
    """Return the form of `model` that scores fastest on the default device.

    That is the model as it is on a GPU, and on the CPU the same model with its quantized layers
    made dense in place; see `dequantized`.
    """
    return dequantized(model) if mx.default_device() == mx.cpu else model


def dequantized(model: nn.Module) -> nn.Module:
    """Replace, in place, every quantized linear layer by its dense float32 form.

    An embedding, too, but where the model has a head: of that only some rows are looked up.
    """
    untied = any(path.rpartition(".")[2] == "lm_head" for path, _ in model.named_modules())
    dense: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if isinstance(module, QuantizedSplitSwitchLinear):
            continue  # a stack stays as it is, as mlx-lm's own do
        if isinstance(module, (QuantizedSplitLinear, nn.QuantizedLinear, LUTLinear, MixedLinear)):
            layer: nn.Module = nn.Linear(1, 1, bias=False)
            if "bias" in module:
                layer.bias = module.bias
        elif isinstance(module, nn.QuantizedEmbedding) and not untied:
            layer = nn.Embedding(1, 1)
        else:
            continue
        layer.weight = dense_weight(module)
        mx.eval(layer.parameters())
        dense.append((path, layer))
    model.update_modules(tree_unflatten(dense))
    return model


def dense_weight(module: nn.Module) -> mx.array:
    """Return the float32 weight (out, in) that a quantized layer stands for."""
    if isinstance(module, (LUTLinear, MixedLinear)):
        return module.dense().astype(mx.float32)
    quantized = Quantized(module["weight"], module["scales"], module.get("biases"))
    settings = {"bits": module.bits, "group_size": module.group_size, "mode": module.mode}
    w = dequantize(quantized, **settings)  # type: ignore[arg-type]
    clusters = getattr(module, "clusters", 1)
    return w.reshape(*w.shape[:-1], clusters, -1).sum(axis=-2)
