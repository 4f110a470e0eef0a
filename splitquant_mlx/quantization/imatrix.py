"""Fit affine scales and biases to a weight under an importance per input channel.

Round to nearest computes scale and bias from the range of a group, whatever the inputs are. With
h_j the mean squared input of channel j, the error of one layer output is approximately

    sum_j h_j (w_j - scale * q_j - bias)^2

(llama.cpp's "importance matrix"). For given codes q, the optimal scale and bias are a weighted
linear regression; for given scale and bias, the optimal codes are the nearest ones: see
`group_fit`.

`code_parts_weighted` does the same for the parts of a split weight. Only entries of the part are
weighted, and only the scale is fitted: the zeros in place of other parts' entries stay exact.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from splitquant_mlx.quantization.affine import (
    Quantized,
    code_parts,
    concatenate,
    dequantize,
    pack,
    pack_groups,
)
from splitquant_mlx.quantization.group_fit import (
    fit_groups,
    nearest_codes,
    relative_importance,
    stored_as,
)

SHRINKS = (1.0, 0.9, 0.8)
REFITS = 4
BLOCK = 1 << 20  # entries
FITTED = 1 << 16  # entries of groups that are fitted at once


def quantize_weighted(
    w: mx.array, importance: mx.array, *, bits: int = 4, group_size: int = 64
) -> Quantized:
    """Quantize `w` with scales and biases fitted under `importance`.

    Args:
        w: float weight (out, in), `in` a multiple of `group_size`.
        importance: (in,), not negative: the mean squared input of every channel.
        bits: bits per code.
        group_size: inputs that share a scale and a bias.

    Returns:
        Codes, scales and biases; scales and biases have the dtype of `w`. In each group, the error
        under `importance` is at most that of `mlx.core.quantize`.
    """
    on_cpu, top = mx.default_device() == mx.cpu, 2**bits - 1
    importance = importance.astype(mx.float32)
    h: Any = np.array(importance) if on_cpu else importance
    h = h.reshape(-1, group_size)
    rows = max(1, BLOCK // w.shape[1])
    pieces = []
    for start in range(0, len(w), rows):
        columns: Any = mx.contiguous(w[start : start + rows].astype(mx.float32).T)
        columns = np.array(columns) if on_cpu else columns
        columns = columns.reshape(-1, group_size, columns.shape[-1])
        several = max(1, FITTED // columns[0].size)
        fitted = []
        for first in range(0, len(columns), several):
            groups, weights = columns[first : first + several], h[first : first + several]
            scale, bias = fit_groups(groups, weights, top=top, stored=stored_as(w.dtype))
            codes = nearest_codes(groups, scale[:, None], bias[:, None], top)
            fitted.append((codes, scale, bias))
        codes, scales, biases = zip(*fitted, strict=True)
        pieces.append(pack_groups(codes, scales, biases, bits, w.dtype))
        mx.eval(list(pieces[-1]))
    return concatenate(pieces, axis=0)


def code_parts_weighted(
    parts: Sequence[mx.array], importance: mx.array, *, bits: int, group_size: int
) -> Quantized:
    """Quantize parts like `affine.code_parts`, with scales fitted under `importance`.

    Args:
        parts: k arrays (out, in) float32, zero where the weight belongs to another part.
        importance: (in,), as for `quantize_weighted`.
        bits: bits per code.
        group_size: inputs of a part that share a scale.
    """
    return concatenate([_fit_part(part, importance, bits, group_size) for part in parts], axis=-1)


def _fit_part(part: mx.array, importance: mx.array, bits: int, group_size: int) -> Quantized:
    top = 2**bits - 1
    plain = code_parts([part], bits=bits, group_size=group_size, granularity="group")
    grouped = part.reshape(part.shape[0], -1, group_size)
    h = mx.where(grouped == 0, 0, relative_importance(importance.reshape(-1, group_size)))
    low, high = mx.minimum(grouped.min(-1), 0), mx.maximum(grouped.max(-1), 0)
    width = mx.where(high > low, high - low, 1)
    # code 0 for zero if it is the minimum or maximum
    sign = mx.where(high > -low, 1, -1)
    zero = mx.round(mx.minimum(-low, high) / width * top)
    best = [_part_error(grouped, h, dequantize(plain, bits=bits, group_size=group_size)), *plain]
    for shrink in SHRINKS:
        scale = sign * width * (shrink / top)
        for _ in range(REFITS):
            steps = _steps(grouped, scale, zero, top)
            weighted = steps * h
            square = (weighted * steps).sum(-1)
            fitted = (weighted * grouped).sum(-1) / mx.where(square > 0, square, 1)
            scale = mx.where(fitted * sign > 0, fitted, scale)
        steps = _steps(grouped, scale, zero, top)
        codes = pack((steps + zero[..., None]).reshape(part.shape), bits)
        new = _part_error(grouped, h, steps * scale[..., None]), codes, scale, -zero * scale
        best = _better(new, best)
    return Quantized(*best[1:])


def _steps(grouped: mx.array, scale: mx.array, zero: mx.array, top: int) -> mx.array:
    """Return codes minus the code of zero, as floats."""
    nearest = mx.floor(grouped / scale[..., None] + 0.5)
    return mx.clip(nearest, -zero[..., None], top - zero[..., None])


def _part_error(grouped: mx.array, h: mx.array, values: mx.array) -> mx.array:
    return (mx.square(grouped - values.reshape(grouped.shape)) * h).sum(-1)


def _better(candidate: Sequence[mx.array], best: Sequence[mx.array]) -> list[mx.array]:
    """Select the (error, arrays of each group, ...) of lower error, group by group."""
    better = candidate[0] < best[0]
    shape = (*better.shape, -1)  # codes are several words per group
    return [
        mx.where(better[..., None], new.reshape(shape), old.reshape(shape)).reshape(old.shape)
        for new, old in zip(candidate, best, strict=True)
    ]
