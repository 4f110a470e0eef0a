"""Predict how quantizing one layer changes the model's output, from the layer's inputs."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from splitquant_mlx.calibration.statistics import FEW_TOKENS
from splitquant_mlx.calibration.sums import hessian
from splitquant_mlx.quantization.affine import Quantized, dequantize
from splitquant_mlx.quantization.gptq import gptq_quantize
from splitquant_mlx.quantization.imatrix import quantize_weighted

Option = tuple[int, int]  # bits, group_size
ROWS = 256
FEW_ROWS = 64  # of these rows, which are quantized at every option
EXPERTS = 16  # sampled from a stack
HEAD_ROWS = 2048
MEASURED_BITS = 4
# measured / predicted divergence of all layers, to that of a tied embedding, 4 and 4.5 bits/weight:
# on WikiText-2 1.3 for SmolLM2-135M and 1.4 for Qwen2.5-Coder-0.5B, on their own texts 1.2
TRANSFER = 1.4
QUANTILE = 0.999  # of the norms of gradients: larger ones are clipped


def some_rows(w: mx.array, axis: int = 0, number: int = ROWS) -> mx.array:
    """Return about `number` evenly spaced entries along an axis."""
    size = w.shape[axis]
    return mx.take(w, mx.arange(0, size, max(1, size // number)), axis=axis)


def clip_outliers(g: mx.array) -> mx.array:
    """Scale the largest rows of gradients (n, rows) down to the `QUANTILE` of their norms."""
    norms = mx.linalg.norm(g, axis=-1, keepdims=True)
    limit = mx.sort(norms.flatten())[int(QUANTILE * (len(g) - 1))]
    return g * mx.where(norms > limit, limit / norms, 1)


def layer_divergences(
    w: mx.array, x: mx.array, g: mx.array, options: Sequence[Option]
) -> dict[Option, float]:
    """Return the predicted divergence, nats per token, at each option.

    That of gptq is measured at one option. The others are in proportion to what fitted scales do in
    a few rows.

    Args:
        w: weight (out, in).
        x: inputs (n, in).
        g: gradients (n, rows) at `some_rows` of the output.
        options: bits and group sizes to predict for.
    """
    rows, middle = some_rows(w), middle_of(options)
    few = some_rows(rows, number=FEW_ROWS)  # enough for the ratios between options

    def divergence(error: mx.array) -> mx.array:
        return mx.square(x @ error.T).sum()

    by_option = divergences(few, mx.square(x).mean(0), options, divergence)
    at_middle = TRANSFER * w.shape[0] / len(rows) / 2 * measure(rows, x, g, middle).lower
    return _scaled(by_option, middle, at_middle)


def stack_divergences(
    w: mx.array,
    x: mx.array,
    g: mx.array,
    routes: np.ndarray,
    options: Sequence[Option],
    tokens: int,
) -> dict[Option, float]:
    """Return the predicted divergence of a stack of experts, from a sample of them.

    Args:
        w: weight (experts, out, in).
        x: inputs (n, in), one row per token and expert.
        g: gradients (n, rows) at `some_rows` of the output.
        routes: expert of each row (n,).
        options: bits and group sizes to predict for.
        tokens: number of tokens routed.
    """
    counts = np.bincount(routes, minlength=len(w))
    by_use = np.argsort(-counts)[: np.count_nonzero(counts)]
    sample = by_use[:: max(1, len(by_use) // EXPERTS)]
    totals = dict.fromkeys(options, 0.0)
    for expert in sample:
        rows = mx.array(np.flatnonzero(routes == expert))
        matrix = w[expert].astype(mx.float32)
        for option, value in layer_divergences(matrix, x[rows], g[rows], options).items():
            totals[option] += value * rows.size
    scale = counts.sum() / counts[sample].sum() / tokens
    return {option: float(value * scale) for option, value in totals.items()}


def embedding_divergences(
    rows: mx.array, g: mx.array, options: Sequence[Option], error: mx.array | None = None
) -> dict[Option, float]:
    """Return the divergence caused by looked-up rows.

    Args:
        rows: of the embedding, (n, width).
        g: gradients where rows are looked up, (m, width).
        options: bits and group sizes to predict for.
        error: of the rows at the middle option, if gptq quantizes them for a tied head, which sets
            their directions. Without it, scales are fitted.
    """
    g = clip_outliers(g)

    def divergence(error: mx.array) -> mx.array:
        return mx.square(g @ error.T).mean() / 2

    by_option = divergences(rows, mx.ones(rows.shape[1]), options, divergence)
    if error is None:
        return by_option
    return _scaled(by_option, middle_of(options), float(divergence(error).item()))  # type: ignore[arg-type]


def middle_of(options: Sequence[Option]) -> Option:
    """Return the option at which gptq is measured."""
    return options[len(options) // 2]


def _scaled(by_option: dict[Option, float], option: Option, value: float) -> dict[Option, float]:
    """Scale all values so that the one of `option` is `value`."""
    scale = value / (by_option[option] or 1.0)
    return {key: scale * of_key for key, of_key in by_option.items()}


class Measured(NamedTuple):
    """Mean squared change of a layer's output, weighted by gradients.

    Attributes:
        fitted: with fitted scales.
        gptq: with gptq.
        error: gptq's weight errors; None with too few tokens for it, and `gptq` is then `fitted`.
    """

    fitted: float
    gptq: float
    error: mx.array | None

    @property
    def lower(self) -> float:
        """Return the lower of both."""
        return min(self.fitted, self.gptq)


def measure(rows: mx.array, x: mx.array, g: mx.array, option: Option) -> Measured:
    """Measure gptq and fitted scales at one option, half on tokens that gptq does not use.

    Args:
        rows: of a weight, (m, in).
        x: inputs (n, in).
        g: gradients (n, m), whose axes may be 1.
        option: bits and group size.
    """
    used = len(x) if len(x) < FEW_TOKENS else 3 * len(x) // 4
    bits, group_size = option

    def error_of(quantized: Quantized) -> mx.array:
        return rows - dequantize(quantized, bits=bits, group_size=group_size)

    def output(error: mx.array) -> float:
        square = mx.square((x @ error.T) * g).sum(-1)
        halves = [part.mean().item() for part in (square[:used], square[used:]) if len(part)]
        return sum(halves) / len(halves)  # type: ignore[arg-type]

    importance = mx.square(x[:used]).mean(0)
    plain = quantize_weighted(rows, importance, bits=bits, group_size=group_size)
    fitted = output(error_of(plain))
    if used == len(x):
        return Measured(fitted, fitted, None)
    h = hessian(x[:used]) / used
    error = error_of(gptq_quantize(rows, h, bits=bits, group_size=group_size))
    return Measured(fitted, output(error), error)


def divergences(
    w: mx.array,
    importance: mx.array,
    options: Sequence[Option],
    divergence: Callable[[mx.array], mx.array],
) -> dict[Option, float]:
    """Return `divergence` of the rounding error of `w` (out, in) at each option.

    Errors with more than `MEASURED_BITS` are not computed: from there on they shrink with the step
    of the grid, range / (2^bits - 1), and the divergence with its square. In SmolLM2-135M a layer's
    divergence at 5, 6 and 8 bits is 1.02 times (geometric mean) that of its 4 bits times the ratio
    of the squares, with a standard deviation of 5 %; the sample of rows alone makes 9 %.
    """
    limit = max(MEASURED_BITS, min(bits for bits, _ in options))

    @cache
    def measured(bits: int, group_size: int) -> float:
        quantized = quantize_weighted(w, importance, bits=bits, group_size=group_size)
        error = w - dequantize(quantized, bits=bits, group_size=group_size)
        return float(divergence(error).item())  # type: ignore[arg-type]

    predicted = {}
    for bits, group_size in options:
        lower = min(bits, limit)
        step_ratio = (2**lower - 1) / (2**bits - 1)
        predicted[bits, group_size] = measured(lower, group_size) * step_ratio**2
    return predicted


def sample_positions(count: int) -> slice:
    """Return at most HEAD_ROWS of `count` positions, evenly spaced."""
    return slice(None, None, -(-count // HEAD_ROWS))


def as_rows(x: mx.array) -> mx.array:
    """Return x (..., width) as float32 rows (n, width)."""
    return x.reshape(-1, x.shape[-1]).astype(mx.float32)
