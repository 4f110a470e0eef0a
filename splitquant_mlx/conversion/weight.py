"""Convert one weight as planned: cluster, split, quantize, and measure what was lost.

Large weights go through in blocks of rows, whose intermediate arrays fit in the processor's cache
and do not add to the peak of memory.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import mlx.core as mx
import numpy as np

from splitquant_mlx.conversion.plan import LayerPlan
from splitquant_mlx.nn.split_layers import scale_dtype
from splitquant_mlx.quantization.affine import (
    Quantized,
    code_parts,
    concatenate,
    dequantize,
    quantize,
    round_scales,
)
from splitquant_mlx.quantization.gptq import quantize_compensated
from splitquant_mlx.quantization.imatrix import code_parts_weighted, quantize_weighted
from splitquant_mlx.quantization.kmeans import Clustering
from splitquant_mlx.quantization.split import cluster_weight, parts_of
from splitquant_mlx.quantization.split_cpu import code_split
from splitquant_mlx.recipe import Recipe

BLOCK = 1 << 19  # entries
LARGE = 1 << 24  # entries that a core is not left alone with
SAMPLE = 1 << 18  # entries that the signal-to-noise ratio is taken over
# bits of the exponent, all of which are set in NaN and infinite values alone
EXPONENT = {
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
    mx.float32: (mx.uint32, 0x7F800000),
}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Hold a converted weight.

    Attributes:
        quantized: codes, scales and biases; of a split weight, the parts side by side.
        cut_points: of a split weight, ascending.
        snr_db: 10 log10(sum w^2 / sum (w - w_hat)^2), dB, over a sample of evenly spaced rows
            where there are more than 2^18 entries; None without any error.
        seconds: time of each stage, s.
    """

    quantized: Quantized
    cut_points: tuple[float, ...] = ()
    snr_db: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def convert_weight(
    w: mx.array, layer: LayerPlan, recipe: Recipe, moment: mx.array | None = None
) -> Converted:
    """Convert `w` (..., out, in), float16, bfloat16 or float32, in this thread's stream.

    Args:
        w: the weight.
        layer: what to do with it.
        recipe: the settings of all layers.
        moment: of the layer's inputs; (in,) for a layer fitted by "imatrix", (in, in) by "gptq".

    Raises:
        ValueError: when `w` holds NaN or infinite values, or values too large to quantize.
    """
    started = time.perf_counter()
    if layer.action == "split":
        try:
            clustering = cluster_weight(w, recipe.clusters, recipe.kmeans)
        except ValueError:
            require_finite(w)
            raise
        clustered = time.perf_counter()
        quantized = _quantize_split(w, clustering, layer, recipe, moment)
    else:
        clustering = None
        require_finite(w)
        clustered = started
        quantized = _quantize_whole(w, layer, recipe, moment)
    mx.eval([array for array in quantized if array is not None])
    snr_db = _snr_db(w, quantized, layer, recipe.clusters if clustering else 1)
    return Converted(
        quantized=quantized,
        cut_points=clustering.cut_points if clustering else (),
        snr_db=snr_db,
        seconds={"cluster": clustered - started, "quantize": time.perf_counter() - clustered},
    )


def require_finite(w: mx.array) -> None:
    """Raise ValueError when `w` holds NaN or infinite values."""
    unsigned, exponent = EXPONENT[w.dtype]
    patterns = np.array(w.view(unsigned), copy=False).reshape(-1)
    for start in range(0, patterns.size, BLOCK):
        if np.any((patterns[start : start + BLOCK] & exponent) == exponent):
            raise ValueError("holds NaN or infinite values")


def _quantize_whole(
    w: mx.array, layer: LayerPlan, recipe: Recipe, moment: mx.array | None
) -> Quantized:
    settings = {"bits": layer.bits or 0, "group_size": layer.group_size or 0}
    if layer.fit == "rtn" or moment is None:
        return _quantize_plainly(w, **settings, granularity=recipe.granularity, mode=layer.mode)
    if layer.fit == "imatrix":
        return quantize_weighted(w, moment, **settings)
    return quantize_compensated(w, np.array(moment), **settings, sweeps=recipe.sweeps or 0)


def _quantize_plainly(
    w: mx.array, *, bits: int, group_size: int, granularity: str, mode: str
) -> Quantized:
    """Round to nearest, on all cores where one would be at it when all other layers are done."""

    def quantized(rows: mx.array) -> Quantized:
        found = quantize(rows, bits=bits, group_size=group_size, granularity=granularity, mode=mode)
        mx.eval([array for array in found if array is not None])
        return found

    apart = w.ndim == 2 and granularity != "tensor" and mx.default_device() == mx.cpu
    if not apart or w.size <= LARGE:
        return quantized(w)
    rows = max(1, LARGE // w.shape[1])
    pieces = _helpers().map(
        lambda start: quantized(w[start : start + rows]), range(0, len(w), rows)
    )
    return concatenate(list(pieces), axis=0)


@cache
def _helpers() -> ThreadPoolExecutor:
    """Return threads that stay, as mlx keeps something for each in which it computes."""
    return ThreadPoolExecutor(os.cpu_count())


def _quantize_split(
    w: mx.array,
    clustering: Clustering,
    layer: LayerPlan,
    recipe: Recipe,
    moment: mx.array | None,
) -> Quantized:
    bits, group_size = layer.bits or 0, layer.group_size or 0
    dtype = scale_dtype(w.dtype)
    if moment is None and recipe.granularity == "group" and mx.default_device() == mx.cpu:
        bounds = clustering.upper_bounds
        coded = code_split(w, bounds, recipe.clusters, bits=bits, group_size=group_size)
        return round_scales(coded, bits, dtype)
    # one scale a tensor has to see the whole tensor
    rows = w.shape[0] if recipe.granularity == "tensor" else max(1, BLOCK // w.shape[1])
    blocks = []
    for start in range(0, w.shape[0], rows):
        full = w[start : start + rows].astype(mx.float32)
        parts = parts_of(full, clustering, recipe.clusters)
        if moment is None:
            granularity = recipe.granularity
            block = code_parts(parts, bits=bits, group_size=group_size, granularity=granularity)
        else:
            block = code_parts_weighted(parts, moment, bits=bits, group_size=group_size)
        mx.eval(block)
        blocks.append(block)
    return round_scales(concatenate(blocks, axis=0), bits, dtype)


def _snr_db(w: mx.array, quantized: Quantized, layer: LayerPlan, parts: int) -> float | None:
    step = -(-w.size // SAMPLE)

    def sample(array: mx.array) -> mx.array:
        return array.reshape(-1, array.shape[-1])[::step]

    w = sample(w)
    w_hat = dequantize(
        Quantized(
            sample(quantized.weight),
            sample(quantized.scales),
            None if quantized.biases is None else sample(quantized.biases),
        ),
        bits=layer.bits or 0,
        group_size=layer.group_size or 0,
        mode=layer.mode,
    )
    w_hat = w_hat.reshape(w.shape[0], parts, -1).sum(axis=1)
    w = w.astype(mx.float32)
    # over the peak, squares neither overflow nor vanish; row sums first: float32 loses digits in
    # one long sum
    peak = mx.maximum(mx.max(mx.abs(w)), 1e-37)
    signal, noise = (mx.sum(mx.sum(x * x, axis=-1)) for x in (w / peak, (w - w_hat) / peak))
    mx.eval(signal, noise)
    if not mx.isfinite(noise).item():
        raise ValueError(f"holds values up to {peak.item()}, too large to quantize")
    if not signal.item() or not noise.item():
        return None
    return (10 * mx.log10(signal / noise)).item()  # type: ignore[return-value]
