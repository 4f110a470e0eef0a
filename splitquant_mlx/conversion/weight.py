"""Convert one weight as planned, and measure the error."""

import math
import time
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from splitquant_mlx.calibration.statistics import Mean
from splitquant_mlx.conversion.plan import LayerPlan
from splitquant_mlx.conversion.quantizers import BLOCK, QUANTIZERS, Stored
from splitquant_mlx.nn.lut_model_file import lut_weight, mixed_weight
from splitquant_mlx.quantization.affine import Quantized, dequantize
from splitquant_mlx.quantization.lut import Lut
from splitquant_mlx.quantization.salience import Mixed

SAMPLE = 1 << 18  # entries sampled for the signal-to-noise ratio
# exponent bits, which are all set only in NaN and infinite values
EXPONENT = {
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
    mx.float32: (mx.uint32, 0x7F800000),
}


class UnusableWeightError(ValueError):
    """The weight has non-finite values, or values too large to quantize."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Result of converting a weight.

    Attributes:
        tensors: stored tensors of `Quantized`, `Lut` or `Mixed`, by leaf name.
        cut_points: of a split weight, ascending.
        snr_db: 10 log10(sum w^2 / sum (w - w_hat)^2), dB, over a sample of evenly spaced rows
            if there are more than 2^18 entries; None if the error is zero.
        seconds: time of each stage, s.
    """

    tensors: dict[str, mx.array]
    cut_points: tuple[float, ...] = ()
    snr_db: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def convert_weight(w: mx.array, layer: LayerPlan, inputs: Mean | None = None) -> Converted:
    """Convert `w` (..., out, in), float16, bfloat16 or float32, in the stream of this thread.

    Args:
        w: the weight.
        layer: its plan.
        inputs: mean of the statistic of the layer's inputs that its quantizer needs; per expert
            for a stack of experts.

    Raises:
        UnusableWeightError: `w` contains NaN or infinite values, or values too large to quantize.
    """
    started = time.perf_counter()
    if layer.action != "split":  # clustering checks this itself
        require_finite(w)
    if layer.action == "keep":
        return Converted(tensors={"weight": w})
    try:
        quantized, cut_points, cluster_s = QUANTIZERS[layer.quantizer].apply(w, layer, inputs)
    except ValueError:
        require_finite(w)
        raise
    tensors = {leaf: x for leaf, x in quantized._asdict().items() if x is not None}
    mx.eval(tensors)
    snr_db = _snr_db(w, quantized, layer)
    return Converted(
        tensors=tensors,
        cut_points=cut_points,
        snr_db=snr_db,
        seconds={"cluster": cluster_s, "quantize": time.perf_counter() - started - cluster_s},
    )


def require_finite(w: mx.array) -> None:
    """Raise UnusableWeightError if the float array `w` contains NaN or infinite values."""
    if w.dtype not in EXPONENT:
        return
    unsigned, exponent = EXPONENT[w.dtype]
    patterns = np.array(w.view(unsigned), copy=False).reshape(-1)
    for start in range(0, patterns.size, BLOCK):
        if np.any((patterns[start : start + BLOCK] & exponent) == exponent):
            raise UnusableWeightError("NaN or infinite values")


def _require_in_range(w: mx.array, quantized: Stored, bits: int, noise: float) -> None:
    """Raise UnusableWeightError if scale * code or a bias overflows its dtype, or is NaN.

    `noise` of a sample of rows is then infinite or NaN.
    """
    fits = math.isfinite(noise)
    if isinstance(quantized, Quantized) and quantized.biases is not None:
        largest = mx.finfo(quantized.scales.dtype).max
        # mlx reduces 16-bit floats slowly on a CPU
        full = (x.astype(mx.float32) for x in (quantized.scales, quantized.biases))
        scale, bias = (mx.abs(x).max().item() for x in full)
        fits = fits and scale * (2**bits - 1) <= largest and bias <= largest  # type: ignore[operator]
    if not fits:
        raise UnusableWeightError(f"values up to {mx.abs(w).max().item()}, too large to quantize")


def stored_rows(stored: Stored, rows: slice, *, bits: int, group_size: int, mode: str) -> mx.array:
    """Return `rows` of the dequantized float32 weight, with the rows of all experts in one axis."""
    if isinstance(stored, Mixed):
        return mixed_weight(*stored, rows)
    arrays = (None if a is None else a.reshape(-1, a.shape[-1])[rows] for a in stored)
    if isinstance(stored, Lut):
        return lut_weight(*arrays).astype(mx.float32)  # type: ignore[arg-type]
    settings = {"bits": bits, "group_size": group_size, "mode": mode}
    return dequantize(Quantized(*arrays), **settings)  # type: ignore[arg-type]


def _snr_db(w: mx.array, quantized: Stored, layer: LayerPlan) -> float | None:
    rows = slice(None, None, -(-w.size // SAMPLE))
    sizes = {"bits": layer.bits, "group_size": layer.group_size, "mode": layer.mode}
    squares = row_squares(w.reshape(-1, w.shape[-1])[rows], stored_rows(quantized, rows, **sizes))
    signal, noise = (float(x.sum()) for x in squares)
    _require_in_range(w, quantized, layer.bits, noise)
    return decibels(signal, noise) if signal and noise else None


def row_squares(w: mx.array, w_hat: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Return sum w^2 and sum (w - w_hat)^2 of every row, (out,) float64.

    Args:
        w: the weight (out, in).
        w_hat: the dequantized weight, (out, k * in) float32: k concatenated parts to be summed.
    """
    exact = np.array(w.astype(mx.float32)).astype(np.float64)
    parts = np.array(w_hat).reshape(len(exact), -1, exact.shape[1])
    noise = exact - parts.sum(axis=1, dtype=np.float64)
    return np.square(exact).sum(axis=1), np.square(noise).sum(axis=1)


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise), infinite if one of them is zero."""
    return 10 * math.log10(signal / noise) if signal and noise else math.inf
