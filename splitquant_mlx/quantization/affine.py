"""Quantize weights to mlx's affine format, and dequantize them.

A code q of `bits` bits represents w = scale * q + bias, with one scale and bias per `group_size`
inputs of an output row. Codes are packed into uint32 words as a little-endian bit stream. Coarser
granularities use the same format with repeated scales and biases, so that mlx's kernels run them.

`quantize` is equivalent to `mlx.core.quantize`. `quantize_parts` is for the parts of a split
weight, most of whose entries are zero: it represents zero exactly, whereas in general
scale * q0 + bias is no longer zero once scale and bias are rounded to 16 bits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from splitquant_mlx.errors import RecipeError, one_line
from splitquant_mlx.recipe import BITS, GROUP_SIZES, MODES

EPS = 1e-7
GRANULARITIES = ("group", "channel", "tensor")


class Quantized(NamedTuple):
    """Quantized weight in mlx's layout.

    Attributes:
        weight: packed codes, uint32 (..., out, in * bits / 32).
        scales: (..., out, in / group_size).
        biases: like scales; None in modes without biases.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None

    @property
    def nbytes(self) -> int:
        """Return the stored size in bytes."""
        return sum(array.nbytes for array in self if array is not None)


def quantize(
    w: mx.array,
    *,
    bits: int = 4,
    group_size: int = 64,
    granularity: str = "group",
    mode: str = "affine",
) -> Quantized:
    """Quantize `w` (..., out, in) by round to nearest; scales and biases have the dtype of `w`.

    Args:
        w: float weight, at least 2-D; `in` must be a multiple of `group_size`.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 32, 64 or 128 (mode "affine").
        granularity: "group" is `mlx.core.quantize`; "channel" and "tensor" compute one scale and
            bias per output row, or per matrix of the last two axes, by the same formula.
        mode: mlx's quantization mode; modes other than "affine" require granularity "group".

    Raises:
        RecipeError: a setting is invalid or contradicts another, `in` is not a multiple of
            `group_size`, or `w` is not a float array of two or more axes.
    """
    _check(w, bits, group_size, granularity, mode)
    if w.shape[-1] % group_size:
        raise RecipeError(
            f"group_size {group_size} does not divide the width {w.shape[-1]} of a weight of "
            f"shape {tuple(w.shape)}: use one of 32, 64, 128 that does, or keep this layer"
        )
    if granularity == "group":
        weight, scales, *biases = mx.quantize(w, group_size, bits, mode)
        return Quantized(weight, scales, biases[0] if biases else None)
    axes = {"channel": (-1,), "tensor": (-2, -1)}[granularity]
    full = w.astype(mx.float32)
    scale, bias = _fit_range(full.min(axes, keepdims=True), full.max(axes, keepdims=True), bits)
    codes = mx.clip(mx.round((full - bias) / scale), 0, 2**bits - 1).astype(mx.uint32)
    groups = (*w.shape[:-1], w.shape[-1] // group_size)
    return Quantized(
        pack(codes, bits),
        mx.contiguous(mx.broadcast_to(scale, groups)).astype(w.dtype),
        mx.contiguous(mx.broadcast_to(bias, groups)).astype(w.dtype),
    )


def _check(w: mx.array, bits: int, group_size: int, granularity: str, mode: str) -> None:
    """Raise RecipeError for settings and weights that `quantize` does not support."""
    affine = mode == "affine"
    for name, value, allowed in (
        ("mode", mode, tuple(MODES)),
        ("granularity", granularity, GRANULARITIES if affine else GRANULARITIES[:1]),
        ("bits", bits, BITS if affine else (MODES.get(mode, (0, 0))[1],)),
        ("group_size", group_size, GROUP_SIZES if affine else (MODES.get(mode, (0, 0))[0],)),
    ):
        if value not in allowed:
            choices = ", ".join(map(repr, allowed))
            raise RecipeError(f"expected one of {choices}, got {value!r:.40}", field=name)
    if w.ndim < 2 or not mx.issubdtype(w.dtype, mx.floating):
        raise RecipeError(
            f"expected a float weight of two or more axes, got {w.dtype} of shape {tuple(w.shape)}"
        )


def quantize_parts(
    parts: Sequence[mx.array],
    *,
    bits: int = 4,
    group_size: int = 64,
    granularity: str = "group",
    scale_dtype: mx.Dtype | None = None,
) -> Quantized:
    """Quantize the parts of a split weight separately, with an exact zero.

    Up to rounding, (scale, bias, q) and (-scale, bias + (2^bits - 1) * scale, 2^bits - 1 - q)
    represent the same group. If zero has the highest code, as in a part on one side of zero, the
    second form is used: zero has code 0 and the bias is exactly 0. Otherwise the bias is set to
    -q0 * scale after scale is rounded.

    Args:
        parts: k arrays (..., out, in), zero where the weight belongs to another part.
        bits: bits per code.
        group_size: inputs of a part that share a scale and a bias.
        granularity: "group", "channel" or "tensor" (per part).
        scale_dtype: dtype of scales and biases; None selects float16 or bfloat16, whichever rounds
            the scales with less error.

    Returns:
        The parts concatenated along the last axis: weight (..., out, k * in * bits / 32), scales
        and biases (..., out, k * in / group_size).
    """
    coded = code_parts(parts, bits=bits, group_size=group_size, granularity=granularity)
    return round_scales(coded, bits, scale_dtype)


def code_parts(
    parts: Sequence[mx.array], *, bits: int, group_size: int, granularity: str
) -> Quantized:
    """Compute codes and float32 scales and biases: the first step of `quantize_parts`."""
    coded = [
        quantize(part.astype(mx.float32), bits=bits, group_size=group_size, granularity=granularity)
        for part in parts
    ]
    return concatenate([_zero_at_code_0(quantized, bits) for quantized in coded], axis=-1)


def round_scales(quantized: Quantized, bits: int, dtype: mx.Dtype | None) -> Quantized:
    """Round scales and biases, keeping zero exact: the second step of `quantize_parts`."""
    weight, scales, biases = quantized
    assert biases is not None
    zero_code = mx.round(-biases / scales)
    rounded = scales.astype(dtype or _closer_dtype(scales))
    has_zero = (zero_code >= 0) & (zero_code < 2**bits)
    biases = mx.where(has_zero, -zero_code * rounded.astype(mx.float32), biases)
    return Quantized(weight, rounded, biases.astype(rounded.dtype))


def pack_groups(
    codes: Sequence[Any], scales: Sequence[Any], biases: Sequence[Any], bits: int, dtype: mx.Dtype
) -> Quantized:
    """Pack the codes, scales and biases of groups, numpy or mlx arrays, into mlx's layout.

    Args:
        codes: per group, (group_size, out), integer values; or per several, with a first axis.
        scales: per group, (out,), or per several.
        biases: like scales.
        bits: bits per code.
        dtype: of the stored scales and biases.
    """

    def joined(arrays: Sequence[Any]) -> mx.array:
        rows = [mx.array(x).reshape(-1, x.shape[-1]) for x in arrays]
        return mx.contiguous(mx.concatenate(rows).T)

    return Quantized(
        pack(joined(codes), bits), joined(scales).astype(dtype), joined(biases).astype(dtype)
    )


def concatenate(pieces: Sequence[Quantized], axis: int) -> Quantized:
    """Concatenate pieces along the input (-1) or the output (-2) axis."""
    weight = mx.concatenate([piece.weight for piece in pieces], axis=axis)
    scales = mx.concatenate([piece.scales for piece in pieces], axis=axis)
    biases = [piece.biases for piece in pieces if piece.biases is not None]
    return Quantized(weight, scales, mx.concatenate(biases, axis=axis) if biases else None)


def _zero_at_code_0(quantized: Quantized, bits: int) -> Quantized:
    weight, scales, biases = quantized
    assert biases is not None
    flip = mx.round(-biases / scales) == 2**bits - 1
    words = weight.reshape(*scales.shape, -1)
    complement = flip[..., None].astype(mx.uint32) * 0xFFFFFFFF
    return Quantized(
        (words ^ complement).reshape(weight.shape),
        mx.where(flip, -scales, scales),
        mx.where(flip, 0, biases),
    )


def dequantize(
    quantized: Quantized, *, bits: int = 4, group_size: int = 64, mode: str = "affine"
) -> mx.array:
    """Return the dequantized weight (..., out, in) in float32.

    Raises:
        RecipeError: the settings do not match the shapes in `quantized`.
    """
    weight, scales, biases = quantized
    if mode == "affine" and biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    try:
        w = mx.dequantize(weight, scales, biases, group_size, bits, mode)
    except ValueError as exc:
        raise RecipeError(
            f"bits, group_size or mode do not match the weight: {one_line(exc)}"
        ) from exc
    return w.astype(mx.float32)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes (..., n), n a multiple of 32, into uint32 words (..., n * bits / 32)."""
    blocks = codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, 32)
    words = [mx.zeros(blocks.shape[:-1], mx.uint32) for _ in range(bits)]
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        words[word] = words[word] | (blocks[..., i] << offset)
        if offset + bits > 32:
            words[word + 1] = words[word + 1] | (blocks[..., i] >> (32 - offset))
    return mx.stack(words, axis=-1).reshape(*codes.shape[:-1], -1)


def _fit_range(lo: mx.array, hi: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    """Return scale and bias of a range by mlx's formula: the larger extreme and 0 are exact."""
    top = 2**bits - 1
    low_edge = mx.abs(lo) > mx.abs(hi)
    scale = mx.maximum((hi - lo) / top, EPS)
    scale = mx.where(low_edge, scale, -scale)
    edge = mx.where(low_edge, lo, hi)
    zero_code = mx.round(edge / scale)
    at_zero = zero_code == 0
    scale = mx.where(at_zero, scale, edge / mx.where(at_zero, 1, zero_code))
    return scale, mx.where(at_zero, 0, edge)


def _closer_dtype(scales: mx.array) -> mx.Dtype:
    def error(dtype: mx.Dtype) -> float:
        return mx.sum(mx.abs(scales.astype(dtype).astype(mx.float32) - scales)).item()  # type: ignore

    # strictly less: bfloat16 for a range beyond float16, whose error is infinite
    return mx.float16 if error(mx.float16) < error(mx.bfloat16) else mx.bfloat16
