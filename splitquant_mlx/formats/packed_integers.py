"""Dequantize integer codes packed into 32-bit words: AWQ, GPTQ and compressed-tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.packed import (
    Tensors,
    dtype_name,
    replace_packed,
    required,
    weight_settings,
)

GEMM = ("qweight", "qzeros", "scales")
# position in a word at which AutoAWQ stores the code of output 8n + i
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def awq(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    """Dequantize 4-bit AWQ, layout "gemm": qweight (in, out / 8), qzeros (groups, out / 8)."""
    bits = table.get("bits", table.get("w_bit", 4))
    layout = table.get("version") or table.get("checkpoint_format") or table.get("format") or "gemm"
    if bits != 4 or str(layout).lower() != "gemm":
        raise CheckpointError(
            f"expected 4-bit AWQ weights in the layout 'gemm', got {bits} bits and "
            f"{layout!r:.80}: convert the model it was made from"
        )
    size = table.get("group_size", table.get("q_group_size"))

    def unpack(path: str) -> mx.array:
        *packed, scales = (required(tensors, f"{path}.{leaf}") for leaf in GEMM)
        q, zeros = (_words(w, 4)[..., mx.array(AWQ_ORDER)].flatten(-2).T for w in packed)
        return _affine(q, zeros, scales.T, [size])

    return replace_packed(tensors, unpack, dtype)


def gptq(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    """Dequantize b-bit GPTQ: qweight (in b / 32, out), qzeros (groups, out b / 32), g_idx (in,)."""
    bits = table.get("bits", 4)
    if bits not in (2, 4, 8):
        raise CheckpointError(
            f"expected 2, 4 or 8-bit GPTQ weights, got {bits}: convert the model it was made from"
        )
    layout = table.get("checkpoint_format") or table.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or table.get("is_marlin_format"):
        raise CheckpointError(
            f"expected GPTQ weights in the layout 'gptq' or 'gptq_v2', got {layout!r:.80}: "
            "convert the model it was made from"
        )
    offset = 0 if layout == "gptq_v2" else 1  # the first format stores zero points minus 1

    def unpack(path: str) -> mx.array:
        packed, zeros, scales = (required(tensors, f"{path}.{leaf}") for leaf in GEMM)
        ordered = table.get("desc_act") or f"{path}.g_idx" in tensors
        order = required(tensors, f"{path}.g_idx") if ordered else None
        q = _codes(packed.T, bits, None if order is None else order.size)
        zeros = (_codes(zeros, bits, len(q)).T + offset) % 2**bits
        return _affine(q, zeros, scales.T, [table.get("group_size")], order)

    return replace_packed(tensors, unpack, dtype)


def packed_integers(
    tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype
) -> Tensors:
    """Dequantize compressed-tensors' packed integers: weight_packed (out, in b / 32)."""
    settings = weight_settings(table)
    widths = {group.get("num_bits") for group in settings}
    if widths not in ({4}, {8}):
        raise CheckpointError(
            f"expected 4 or 8-bit integers, got {widths}: convert the model it was made from"
        )
    bits: int = widths.pop()  # type: ignore[assignment]  # 4 or 8
    sizes = [group.get("group_size") for group in settings]
    shifted = all(group.get("symmetric") is False for group in settings)
    ordered = all(group.get("actorder") in (True, "group", "dynamic") for group in settings)

    def unpack(path: str) -> mx.array:
        shape = tensors.get(f"{path}.weight_shape")
        inputs = None if shape is None else int(shape[-1].item())  # type: ignore[arg-type]
        q = _codes(tensors[f"{path}.weight_packed"], bits, inputs)
        scales = required(tensors, f"{path}.weight_scale")
        scales = scales if scales.ndim == 2 else scales.reshape(-1, 1)
        zeros, key = mx.full(scales.shape, 2.0 ** (bits - 1)), f"{path}.weight_zero_point"
        if shifted or key in tensors:  # packed along the outputs
            zeros = _codes(required(tensors, key).T, bits, len(scales)).T
        key = f"{path}.weight_g_idx"
        order = required(tensors, key) if ordered or key in tensors else None
        return _affine(q, zeros, scales, sizes, order)

    return replace_packed(tensors, unpack, dtype, "weight_packed")


def _affine(
    q: mx.array,
    zeros: mx.array,
    scales: mx.array,
    sizes: Sequence[int | None],
    order: mx.array | None = None,
) -> mx.array:
    """Return weights (q - z) s.

    Args:
        q: codes (out, in).
        zeros: zero points, of the shape of `scales`.
        scales: (out, groups), or (1, 1).
        sizes: possible group sizes, by config.json.
        order: the group of each input (in,); None when groups are consecutive.

    Raises:
        ValueError: when the shapes or dtypes do not match.
    """
    columns, groups = q.shape[-1], scales.shape[-1]
    if zeros.shape != scales.shape or len(scales) not in (len(q), scales.size):
        raise ValueError(f"zero points {zeros.shape} and scales {scales.shape} for {q.shape}")
    if not mx.issubdtype(scales.dtype, mx.floating):
        raise ValueError(f"expected scales of a float dtype, got {dtype_name(scales.dtype)}")
    expected = [size for size in sizes if size and size > 0] or [columns // groups]
    size = next((size for size in (*expected, columns) if -(-columns // size) == groups), None)
    if size is None:
        raise ValueError(
            f"{groups} groups for {columns} inputs, expected a group size of {expected}"
        )
    consecutive = mx.arange(columns) // size
    valid = order is None or (
        mx.issubdtype(order.dtype, mx.integer) and mx.array_equal(mx.sort(order), consecutive)
    )
    if not valid:
        raise ValueError(f"g_idx: expected {groups} groups of {size} for {columns} inputs")
    order = consecutive if order is None else order.astype(mx.int32)
    return (q - zeros[:, order]) * scales[:, order].astype(mx.float32)


def _codes(packed: mx.array, bits: int, count: int | None = None) -> mx.array:
    """Return the first `count` codes of each row of 32-bit words, as float32; all for None.

    Raises:
        ValueError: when `count` codes need another number of words.
    """
    codes = _words(packed, bits).flatten(-2)
    if count is not None and not 0 <= codes.shape[-1] - count < 32 // bits:
        raise ValueError(f"{count} codes of {bits} bits in {packed.shape[-1]} words")
    return codes[..., :count]


def _words(packed: mx.array, bits: int) -> mx.array:
    """Return the codes of 32-bit words along a new last axis, lowest bits first, as float32."""
    if packed.dtype not in (mx.int32, mx.uint32):
        raise ValueError(f"expected 32-bit words, got {dtype_name(packed.dtype)}")
    words = packed.view(mx.uint32)[..., None]
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    return ((words >> shifts) & (2**bits - 1)).astype(mx.float32)
