"""Turn codes that are packed into words of 32 bits back into weights: AWQ, GPTQ and the like."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.packed import Tensors, packed_layers, part, weight_settings

GEMM = ("qweight", "qzeros", "scales")
# where AutoAWQ puts the code of output 8n + i in a word
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def awq(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    """Undo AWQ of 4 bits in the layout "gemm": qweight (in, out / 8), qzeros (groups, out / 8)."""
    bits = table.get("bits", table.get("w_bit", 4))
    layout = table.get("version") or table.get("checkpoint_format") or table.get("format") or "gemm"
    if bits != 4 or str(layout).lower() != "gemm":
        raise CheckpointError(
            f"expected AWQ weights of 4 bits in the layout 'gemm', got {bits} bits and "
            f"{layout!r:.80}: fetch the model it was made from"
        )
    size = table.get("group_size", table.get("q_group_size"))

    def weight(path: str) -> mx.array:
        *packed, scales = (part(tensors, f"{path}.{leaf}") for leaf in GEMM)
        q, zeros = (_words(w, 4)[..., mx.array(AWQ_ORDER)].flatten(-2).T for w in packed)
        return _affine(q, zeros, scales.T, [size])

    return packed_layers(tensors, weight, dtype)


def gptq(tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype) -> Tensors:
    """Undo GPTQ: qweight (in b / 32, out), qzeros (groups, out b / 32) of b bits, g_idx (in,)."""
    bits = table.get("bits", 4)
    if bits not in (2, 4, 8):
        raise CheckpointError(
            f"expected GPTQ weights of 2, 4 or 8 bits, got {bits}: fetch the model it was made from"
        )
    layout = table.get("checkpoint_format") or table.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or table.get("is_marlin_format"):
        raise CheckpointError(
            f"expected GPTQ weights in the layout 'gptq' or 'gptq_v2', got {layout!r:.80}: fetch "
            "the model it was made from"
        )
    offset = 0 if layout == "gptq_v2" else 1  # the first format stores zero points less 1

    def weight(path: str) -> mx.array:
        packed, zeros, scales = (part(tensors, f"{path}.{leaf}") for leaf in GEMM)
        ordered = table.get("desc_act") or f"{path}.g_idx" in tensors
        order = part(tensors, f"{path}.g_idx") if ordered else None
        q = _codes(packed.T, bits, None if order is None else order.size)
        zeros = (_codes(zeros, bits, len(q)).T + offset) % 2**bits
        return _affine(q, zeros, scales.T, [table.get("group_size")], order)

    return packed_layers(tensors, weight, dtype)


def packed_integers(
    tensors: Tensors, table: Mapping[str, Any], fp8: set[str], dtype: mx.Dtype
) -> Tensors:
    """Undo compressed-tensors' integers: weight_packed (out, in b / 32) and parts of that name."""
    settings = weight_settings(table)
    found_bits = {group.get("num_bits") for group in settings}
    if found_bits not in ({4}, {8}):
        raise CheckpointError(
            f"expected integers of 4 or of 8 bits, got {found_bits}: fetch the model it was made "
            "from"
        )
    bits: int = found_bits.pop()  # type: ignore[assignment]  # one of the two above
    sizes = [group.get("group_size") for group in settings]
    shifted = all(group.get("symmetric") is False for group in settings)
    ordered = all(group.get("actorder") in (True, "group", "dynamic") for group in settings)

    def weight(path: str) -> mx.array:
        shape = tensors.get(f"{path}.weight_shape")
        inputs = None if shape is None else int(shape[-1].item())  # type: ignore[arg-type]
        q = _codes(tensors[f"{path}.weight_packed"], bits, inputs)
        scales = part(tensors, f"{path}.weight_scale")
        scales = scales if scales.ndim == 2 else scales.reshape(-1, 1)
        zeros, key = mx.full(scales.shape, 2.0 ** (bits - 1)), f"{path}.weight_zero_point"
        if shifted or key in tensors:  # packed along the outputs
            zeros = _codes(part(tensors, key).T, bits, len(scales)).T
        key = f"{path}.weight_g_idx"
        order = part(tensors, key) if ordered or key in tensors else None
        return _affine(q, zeros, scales, sizes, order)

    return packed_layers(tensors, weight, dtype, "weight_packed")


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
        zeros: (out, groups), as the scales.
        scales: (out, groups), or one of all.
        sizes: which sizes groups of inputs may have, by config.json.
        order: the group of each input, where they do not follow each other.

    Raises:
        ValueError: when they do not fit each other.
    """
    columns, groups = q.shape[-1], scales.shape[-1]
    if zeros.shape != scales.shape or len(scales) not in (len(q), scales.size):
        raise ValueError(f"zero points {zeros.shape} and scales {scales.shape} of {q.shape}")
    if not mx.issubdtype(scales.dtype, mx.floating):
        raise ValueError(f"scales of {str(scales.dtype).rpartition('.')[2]}")
    known = [size for size in sizes if size and size > 0] or [columns // groups]
    size = next((size for size in (*known, columns) if -(-columns // size) == groups), None)
    if size is None:
        raise ValueError(f"{groups} groups of {columns} inputs, where groups have {known}")
    follow = mx.arange(columns) // size
    fits = order is None or (
        mx.issubdtype(order.dtype, mx.integer) and mx.array_equal(mx.sort(order), follow)
    )
    if not fits:
        raise ValueError(f"g_idx, where {groups} groups have {size} of {columns} inputs")
    order = follow if order is None else order.astype(mx.int32)
    return (q - zeros[:, order]) * scales[:, order].astype(mx.float32)


def _codes(packed: mx.array, bits: int, count: int | None = None) -> mx.array:
    """Return the `count` codes of each row of 32-bit words, as float32; what fills the last is cut.

    Raises:
        ValueError: when so many codes take another number of words.
    """
    codes = _words(packed, bits).flatten(-2)
    if count is not None and not 0 <= codes.shape[-1] - count < 32 // bits:
        raise ValueError(f"{count} codes of {bits} bits in {packed.shape[-1]} words")
    return codes[..., :count]


def _words(packed: mx.array, bits: int) -> mx.array:
    """Return the codes of 32-bit words along a new last axis, lowest bits first, as float32."""
    if packed.dtype not in (mx.int32, mx.uint32):
        raise ValueError(f"expected words of 32 bits, got {str(packed.dtype).rpartition('.')[2]}")
    words = packed.view(mx.uint32)[..., None]
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    return ((words >> shifts) & (2**bits - 1)).astype(mx.float32)
