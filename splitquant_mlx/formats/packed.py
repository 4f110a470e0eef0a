"""Shared by the packed layouts: the packed tensors of a layer, and broadcasting of scales."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from splitquant_mlx.errors import CheckpointError, one_line

Tensors = dict[str, mx.array]
# the packed tensors of a layer, which its weight replaces
LEAVES = (
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_global_scale",
    "weight_zero_point", "weight_g_idx", "weight_shape",
)  # fmt: skip


def required(tensors: Tensors, name: str) -> mx.array:
    """Return a tensor of a packed weight. Raises CheckpointError when it is missing."""
    if name not in tensors:
        raise CheckpointError(f"tensor {name!r} of a packed weight is missing: download it again")
    return tensors[name]


def dtype_name(dtype: mx.Dtype) -> str:
    """Return the name of a dtype without its module, such as "uint8"."""
    return str(dtype).removeprefix("mlx.core.")


def weight_settings(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return compressed-tensors' settings of weights, one table per group of layers."""
    groups = (table.get("config_groups") or {}).values()
    settings = [group.get("weights") or {} for group in groups]
    return [{k: v for k, v in weights.items() if v is not None} for weights in settings]


def replace_packed(
    tensors: Tensors, unpack: Callable[[str], mx.array], dtype: mx.Dtype, packed: str = "qweight"
) -> Tensors:
    """Return the tensors with each layer's packed tensors replaced by its weight (out, in).

    Args:
        tensors: the stored tensors.
        unpack: returns the weight of the layer at a path.
        dtype: dtype of the weights.
        packed: name of the packed tensor that every packed layer has.
    """
    result = {}
    for name, w in tensors.items():
        path, _, leaf = name.rpartition(".")
        if f"{path}.{packed}" not in tensors or leaf not in LEAVES:
            result[name] = w
        elif leaf == packed:
            try:
                result[f"{path}.weight"] = unpack(path).astype(dtype)
            except (ArithmeticError, ValueError, TypeError, IndexError) as exc:
                shapes = {
                    leaf: list(tensors[key].shape)
                    for leaf in LEAVES
                    if (key := f"{path}.{leaf}") in tensors
                }
                raise CheckpointError(
                    f"layer {path!r}: its packed tensors do not match each other or config.json "
                    f"({one_line(exc)}), got {shapes}: download it again"
                ) from exc
    return result


def broadcast_scales(
    name: str, scale: mx.array, shape: tuple[int, ...], blocks: Sequence[tuple[int, int]]
) -> mx.array:
    """Repeat scales to the shape of the weight that they multiply.

    A scale may belong to a block (of one of the shapes in `blocks`), a row or a matrix, and in a
    stack of matrices to a column, since some models store stacks as (..., in, out).
    """
    if scale.size == 1:
        return scale.reshape(())
    scale = scale.reshape(-1, *[1] * (len(shape) - 1)) if scale.ndim == 1 else scale
    rows, columns = shape[-2:] if len(shape) > 1 else (1, 1)
    larger = [(1, columns), (rows, columns), *([(rows, 1)] if len(shape) > 2 else [])]
    for height, width in (*blocks, *larger):
        if scale.shape == (*shape[:-2], -(-rows // height), -(-columns // width)):
            scale = mx.repeat(scale, min(height, rows), axis=-2)[..., :rows, :]
            return mx.repeat(scale, min(width, columns), axis=-1)[..., :columns]
    raise CheckpointError(
        f"tensor {name!r}: expected a scale per row or per block of "
        f"{' or '.join(map(str, blocks)) or 'a known size'} of {list(shape)}, got "
        f"{list(scale.shape)}: it is corrupt, or config.json is from another model"
    )
