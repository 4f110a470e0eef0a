"""What the layouts of packed weights have in common: the parts of a layer, and scales of blocks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from splitquant_mlx.errors import CheckpointError, one_line

Tensors = dict[str, mx.array]
# the tensors of a layer that become its weight
LEAVES = (
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_global_scale",
    "weight_zero_point", "weight_g_idx", "weight_shape",
)  # fmt: skip


def part(tensors: Tensors, name: str) -> mx.array:
    """Return a tensor that a packed weight needs. Raises CheckpointError without it."""
    if name not in tensors:
        raise CheckpointError(f"tensor {name!r} of a packed weight is missing: download it again")
    return tensors[name]


def weight_settings(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what compressed-tensors says of weights, for each group of layers."""
    groups = (table.get("config_groups") or {}).values()
    settings = [group.get("weights") or {} for group in groups]
    return [{key: v for key, v in found.items() if v is not None} for found in settings]


def packed_layers(
    tensors: Tensors, weight: Callable[[str], mx.array], dtype: mx.Dtype, packed: str = "qweight"
) -> Tensors:
    """Replace each layer's packed tensors by its weight (out, in)."""
    found = {}
    for name, w in tensors.items():
        path, _, leaf = name.rpartition(".")
        if f"{path}.{packed}" not in tensors or leaf not in LEAVES:
            found[name] = w
        elif leaf == packed:
            try:
                found[f"{path}.weight"] = weight(path).astype(dtype)
            except (ArithmeticError, ValueError, TypeError, IndexError) as exc:
                shapes = {
                    leaf: list(tensors[key].shape)
                    for leaf in LEAVES
                    if (key := f"{path}.{leaf}") in tensors
                }
                raise CheckpointError(
                    f"layer {path!r}: its packed tensors do not fit each other, or config.json "
                    f"({one_line(exc)}), got {shapes}: download it again"
                ) from exc
    return found


def spread(
    name: str, scale: mx.array, shape: tuple[int, ...], blocks: Sequence[tuple[int, int]]
) -> mx.array:
    """Return scales, of which each stands for a block of entries, as an array to multiply with.

    A scale may be of a block of `blocks`, of a row, of a matrix, or of a column where there are
    several matrices, which some models store (in, out).
    """
    if scale.size == 1:
        return scale.reshape(())
    scale = scale.reshape(-1, *[1] * (len(shape) - 1)) if scale.ndim == 1 else scale
    rows, columns = shape[-2:] if len(shape) > 1 else (1, 1)
    whole = [(1, columns), (rows, columns), *([(rows, 1)] if len(shape) > 2 else [])]
    for height, width in (*blocks, *whole):
        if scale.shape == (*shape[:-2], -(-rows // height), -(-columns // width)):
            scale = mx.repeat(scale, min(height, rows), axis=-2)[..., :rows, :]
            return mx.repeat(scale, min(width, columns), axis=-1)[..., :columns]
    raise CheckpointError(
        f"tensor {name!r}: expected a scale for each row or each block of "
        f"{' or '.join(map(str, blocks)) or 'a known size'} of {list(shape)}, got "
        f"{list(scale.shape)}: it is damaged, or config.json is of another model"
    )
