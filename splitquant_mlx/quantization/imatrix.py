"""Fit affine scales and biases to a weight under an importance per input channel.

Round to nearest takes scale and bias from the range of a group, whatever its inputs are like. With
h_j the mean squared input of channel j, the error that the layer's output sees is close to

    sum_j h_j (w_j - scale * q_j - bias)^2

for one output row (llama.cpp's "importance matrix"). For given codes q the best scale and bias are
a weighted linear regression; for given scale and bias the best codes are the nearest ones. Here
ranges of several widths are tried, each followed by a regression, and the best of all is kept. The
range of round to nearest is one of them, so the result is never worse than it.

`code_parts_weighted` does the like for a part of a split weight, where only entries of the part
count, and the scale alone is free: the zeros that stand for entries of other parts stay exact.
"""

from collections.abc import Sequence

import mlx.core as mx

from splitquant_mlx.quantization.affine import Quantized, code_parts, concatenate, dequantize, pack

SHRINKS = (1.0, 0.9, 0.8)
REFITS = 4
BLOCK = 1 << 18  # entries


def quantize_weighted(
    w: mx.array, importance: mx.array, *, bits: int = 4, group_size: int = 64
) -> Quantized:
    """Quantize `w` with scales and biases fitted under `importance`.

    Args:
        w: float weight (out, in), `in` a multiple of `group_size`.
        importance: (in,), not negative: the mean squared input of every channel.
        bits: bits of a code.
        group_size: inputs that share scale and bias.

    Returns:
        Codes, scales and biases, the latter in the dtype of `w`, whose error under `importance`
        is in no group above that of `mlx.core.quantize`.
    """
    rows = max(1, BLOCK // w.shape[1])
    pieces = []
    for start in range(0, w.shape[0], rows):
        block = w[start : start + rows]
        scales, biases = fit_scales(block, importance, bits=bits, group_size=group_size)
        codes = nearest_codes(block, scales, biases, bits)
        piece = pack(codes.reshape(block.shape), bits), scales, biases
        mx.eval(piece)
        pieces.append(piece)
    weight, scales, biases = (mx.concatenate(list(arrays)) for arrays in zip(*pieces, strict=True))
    return Quantized(weight, scales, biases)


def code_parts_weighted(
    parts: Sequence[mx.array], importance: mx.array, *, bits: int, group_size: int
) -> Quantized:
    """Do as `affine.code_parts`, with scales fitted under `importance`; to be rounded alike.

    Args:
        parts: k arrays (out, in) float32, zero where the weight belongs to another part.
        importance: (in,), as for `quantize_weighted`.
        bits: bits of a code.
        group_size: inputs of a part that share a scale.
    """
    return concatenate([_fit_part(part, importance, bits, group_size) for part in parts], axis=-1)


def _fit_part(part: mx.array, importance: mx.array, bits: int, group_size: int) -> Quantized:
    top = 2**bits - 1
    plain = code_parts([part], bits=bits, group_size=group_size, granularity="group")
    grouped = part.reshape(part.shape[0], -1, group_size)
    h = mx.where(grouped == 0, 0, _positive(importance.reshape(-1, group_size)))
    low, high = mx.minimum(grouped.min(-1), 0), mx.maximum(grouped.max(-1), 0)
    width = mx.where(high > low, high - low, 1)
    # zero at code 0 wherever it is at an end
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
        found = _part_error(grouped, h, steps * scale[..., None]), codes, scale, -zero * scale
        best = _better(found, best)
    return Quantized(*best[1:])


def _steps(grouped: mx.array, scale: mx.array, zero: mx.array, top: int) -> mx.array:
    """Return codes less the code of zero, as floats."""
    nearest = mx.floor(grouped / scale[..., None] + 0.5)
    return mx.clip(nearest, -zero[..., None], top - zero[..., None])


def _part_error(grouped: mx.array, h: mx.array, values: mx.array) -> mx.array:
    return (mx.square(grouped - values.reshape(grouped.shape)) * h).sum(-1)


def _better(found: Sequence[mx.array], best: Sequence[mx.array]) -> list[mx.array]:
    """Choose between two of (error, arrays of each group, ...), group by group."""
    better = found[0] < best[0]
    chosen = []
    for new, old in zip(found, best, strict=True):
        shape = (*better.shape, -1)  # codes are several words a group
        picked = mx.where(better[..., None], new.reshape(shape), old.reshape(shape))
        chosen.append(picked.reshape(old.shape))
    return chosen


def fit_scales(
    w: mx.array, importance: mx.array, *, bits: int, group_size: int
) -> tuple[mx.array, mx.array]:
    """Return scales and biases (out, in / group_size) in the dtype of `w`."""
    dtype, top = w.dtype, 2**bits - 1
    grouped = w.astype(mx.float32).reshape(w.shape[0], -1, group_size)
    h = _positive(importance.astype(mx.float32).reshape(-1, group_size))
    _, scales, biases = mx.quantize(w, group_size, bits)
    best = [_error(grouped, h, scales, biases, top), scales, biases]
    fitted = _fit_to_ranges(grouped, h, top)
    for _ in range(REFITS):
        scales, biases = (found.astype(dtype) for found in fitted)
        error = _error(grouped, h, scales, biases, top)
        # a scale that vanishes or overflows in 16 bits has an error of NaN or infinity
        best = _better((error, scales, biases), best)
        _, *fitted = _regress(grouped, h, best[1], best[2], top)
    return best[1], best[2]


def _fit_to_ranges(grouped: mx.array, h: mx.array, top: int) -> list[mx.array]:
    """Return the scale and bias regressed on the codes of whichever range explains most."""
    low, high = grouped.min(-1), grouped.max(-1)
    best: list[mx.array] = []
    for shrink in SHRINKS:
        scale = (high - low) * (shrink / top)
        bias = (low + high) / 2 - scale * (top / 2)
        found = _regress(grouped, h, scale, bias, top)
        if best:
            better = found[0] > best[0]
            found = [mx.where(better, new, old) for new, old in zip(found, best, strict=True)]
        best = found
    return best[1:]


def nearest_codes(w: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """Return the nearest codes (out, groups, group_size), as floats, for the stored scales."""
    grouped = w.astype(mx.float32).reshape(*scales.shape, -1)
    return _codes(grouped, scales.astype(mx.float32), biases.astype(mx.float32), 2**bits - 1)


def _positive(h: mx.array) -> mx.array:
    """Give channels that were never seen a little weight, and groups of them an even one."""
    mean = h.mean(-1, keepdims=True)
    return mx.where(mean > 0, h / mx.where(mean > 0, mean, 1), 1) + 1e-4


def _codes(grouped: mx.array, scale: mx.array, bias: mx.array, top: int) -> mx.array:
    scale = mx.where(scale == 0, 1, scale)
    # not mx.round, which takes five times as long on the CPU
    nearest = mx.floor((grouped - bias[..., None]) * (1 / scale)[..., None] + 0.5)
    return mx.clip(nearest, 0, top)


def _error(
    grouped: mx.array, h: mx.array, scales: mx.array, biases: mx.array, top: int
) -> mx.array:
    scale, bias = scales.astype(mx.float32), biases.astype(mx.float32)
    codes = _codes(grouped, scale, bias, top)
    difference = grouped - codes * scale[..., None] - bias[..., None]
    return (difference * difference * h).sum(-1)


def _regress(
    grouped: mx.array, h: mx.array, scales: mx.array, biases: mx.array, top: int
) -> list[mx.array]:
    """Regress `grouped` on its nearest codes: explained sum of squares, scale, bias."""
    scale, bias = scales.astype(mx.float32), biases.astype(mx.float32)
    codes = _codes(grouped, scale, bias, top)
    total = h.sum(-1)
    weighted = codes * h
    mean_q = weighted.sum(-1) / total
    mean_w = (grouped * h).sum(-1) / total
    variance = (weighted * codes).sum(-1) - mean_q * mean_q * total
    covariance = (weighted * grouped).sum(-1) - mean_q * mean_w * total
    flat = variance <= 1e-6 * total
    slope = covariance / mx.where(flat, 1, variance)
    scale = mx.where(flat, scale, slope)
    return [mx.where(flat, -1, slope * covariance), scale, mean_w - scale * mean_q]
