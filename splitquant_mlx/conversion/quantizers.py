"""Quantizers by name: each computes codes, scales and biases of a weight as its plan says.

A new method needs a function here, an entry in `QUANTIZERS`, and a rule in `plan` to select it.
"""

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from splitquant_mlx.calibration.statistics import Learned, Mean
from splitquant_mlx.calibration.sums import Statistic, hessian, sum_of_squares
from splitquant_mlx.conversion.plan import LayerPlan
from splitquant_mlx.nn.split_layers import scale_dtype
from splitquant_mlx.quantization.affine import (
    Quantized,
    code_parts,
    concatenate,
    pack,
    quantize,
    round_scales,
)
from splitquant_mlx.quantization.gptq import gptq_quantize
from splitquant_mlx.quantization.group_fit import nearest_codes
from splitquant_mlx.quantization.imatrix import code_parts_weighted, quantize_weighted
from splitquant_mlx.quantization.lut import Lut, lut_quantize
from splitquant_mlx.quantization.rounding import kernel_works
from splitquant_mlx.quantization.salience import Mixed, salience_quantize
from splitquant_mlx.quantization.split import cluster_weight, parts_of
from splitquant_mlx.quantization.split_cpu import code_split
from splitquant_mlx.recipe import OWN_LAYERS
from splitquant_mlx.runtime.cores import executor, in_thread_of

Stored = Quantized | Lut | Mixed
# names of all their tensors
LEAVES = tuple(dict.fromkeys((*Quantized._fields, *Lut._fields, *Mixed._fields)))
BLOCK = 1 << 19  # entries
LARGE = 1 << 24  # entries from which a weight is quantized on all cores
POOL = "quantizer"  # name of its threads; not the converter's, which wait for these


class Outcome(NamedTuple):
    """Result of a quantizer.

    Attributes:
        quantized: the stored tensors; parts of a split weight are concatenated.
        cut_points: of a split weight, ascending; empty for a stack of experts.
        cluster_s: time for clustering, s.
    """

    quantized: Stored
    cut_points: tuple[float, ...] = ()
    cluster_s: float = 0.0


Apply = Callable[[mx.array, LayerPlan, Mean | None], Outcome]


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """Quantization method.

    Attributes:
        apply: maps a weight (..., out, in), its plan, and the mean of `statistic` over the layer's
            inputs (None without a statistic) to an `Outcome`.
        statistic: the statistic of the layer's inputs that is needed; None if none is.
    """

    apply: Apply
    statistic: Statistic | None = None


def _rtn(w: mx.array, layer: LayerPlan, inputs: Mean | None) -> Outcome:
    """Round to nearest; large weights on all cores, so that no single core finishes last."""

    def quantize_rows(rows: mx.array) -> Quantized:
        quantized = quantize(
            rows,
            bits=layer.bits,
            group_size=layer.group_size,
            granularity=layer.granularity,
            mode=layer.mode,
        )
        mx.eval([array for array in quantized if array is not None])
        return quantized

    by_rows = w.ndim == 2 and layer.granularity != "tensor" and mx.default_device() == mx.cpu
    if not by_rows or w.size <= LARGE:
        return Outcome(quantize_rows(w))
    rows = max(1, LARGE // w.shape[1])
    blocks = (slice(start, start + rows) for start in range(0, len(w), rows))
    pieces = _map_for(w.size, on_cpu=True)(lambda block: quantize_rows(w[block]), blocks)
    return Outcome(concatenate(list(pieces), axis=0))


def _map_for(size: int, *, on_cpu: bool) -> Callable[..., Iterable[Any]]:
    """Return `map`, parallel for a weight of many entries unless called in a pool thread."""
    parallel = on_cpu and size > LARGE and not in_thread_of(POOL)
    return executor(POOL, os.cpu_count() or 1).map if parallel else map


def is_large_stack(layer: LayerPlan) -> bool:
    """Return whether a layer is a stack of experts too large for two of them in memory."""
    return len(layer.shape) == 3 and math.prod(layer.shape) > LARGE


def _per_expert(apply: Callable[[mx.array, LayerPlan, mx.array | None], Outcome]) -> Apply:
    """Extend `apply` to stacks (experts, out, in); large stacks are quantized on all cores."""

    def apply_stacked(w: mx.array, layer: LayerPlan, inputs: Mean | None) -> Outcome:
        if w.ndim == 2:
            assert inputs is None or isinstance(inputs, mx.array)
            return apply(w, layer, inputs)

        def apply_one(expert: int) -> Outcome:
            outcome = apply(w[expert], layer, None if inputs is None else inputs[expert])
            mx.eval([array for array in outcome.quantized if array is not None])
            return outcome

        map_experts = _map_for(w.size, on_cpu=mx.default_device() == mx.cpu)
        outcomes = list(map_experts(apply_one, range(len(w))))
        tensors = zip(*(outcome.quantized for outcome in outcomes), strict=True)
        stacked = Quantized(*(mx.stack(list(arrays)) for arrays in tensors))
        return Outcome(stacked, cluster_s=sum(outcome.cluster_s for outcome in outcomes))

    return apply_stacked


@_per_expert
def _imatrix(w: mx.array, layer: LayerPlan, inputs: mx.array | None) -> Outcome:
    assert inputs is not None
    return Outcome(quantize_weighted(w, inputs, bits=layer.bits, group_size=layer.group_size))


@_per_expert
def _gptq(w: mx.array, layer: LayerPlan, inputs: mx.array | None) -> Outcome:
    sizes = {"bits": layer.bits, "group_size": layer.group_size}
    assert inputs is not None
    map_blocks = _map_for(w.size, on_cpu=not kernel_works())
    return Outcome(gptq_quantize(w, inputs, **sizes, sweeps=layer.sweeps, map_blocks=map_blocks))


def _lut(w: mx.array, layer: LayerPlan, inputs: Mean | None) -> Outcome:
    settings = {"bits": layer.bits, "outliers": layer.outliers, "sweeps": layer.sweeps}
    powers = layer.codebook == "powers"
    return Outcome(lut_quantize(w, np.array(inputs), **settings, powers=powers))


def _salience(w: mx.array, layer: LayerPlan, inputs: Mean | None) -> Outcome:
    sizes = {"bits": layer.bits, "group_size": layer.group_size}
    return Outcome(salience_quantize(w, np.array(inputs), **sizes, sweeps=layer.sweeps))


def _learned(w: mx.array, layer: LayerPlan, inputs: Mean | None) -> Outcome:
    """Round the learned weights, see `blockwise`; a layer outside blocks is rounded to nearest."""
    if inputs is None:
        return _rtn(w, layer, inputs)
    assert isinstance(inputs, Learned)
    scales, biases = (array.astype(w.dtype) for array in (inputs.scales, inputs.biases))
    scale, bias = (array.astype(mx.float32) for array in (scales, biases))
    codes = nearest_codes(inputs.w, scale, bias, 2**layer.bits - 1)
    packed = pack(codes.reshape(w.shape), layer.bits)
    return Outcome(Quantized(packed, scales.squeeze(-1), biases.squeeze(-1)))


@_per_expert
def _splitquant(w: mx.array, layer: LayerPlan, inputs: mx.array | None) -> Outcome:
    """Split by k-means and quantize every part; `inputs` are the importance of the channels.

    Large weights are processed in blocks of rows, whose intermediate arrays fit in the CPU cache
    and do not increase peak memory.
    """
    started = time.perf_counter()
    clustering = cluster_weight(w, layer.clusters, layer.kmeans)
    cluster_s = time.perf_counter() - started
    sizes = {"bits": layer.bits, "group_size": layer.group_size}
    if inputs is None and layer.granularity == "group" and mx.default_device() == mx.cpu:
        coded = code_split(w, clustering.upper_bounds, layer.clusters, **sizes)
    else:
        # one scale per tensor needs all rows at once
        rows = len(w) if layer.granularity == "tensor" else max(1, BLOCK // w.shape[1])
        blocks = []
        for start in range(0, len(w), rows):
            full = w[start : start + rows].astype(mx.float32)
            parts = parts_of(full, clustering, layer.clusters)
            if inputs is None:
                block = code_parts(parts, **sizes, granularity=layer.granularity)
            else:
                block = code_parts_weighted(parts, inputs, **sizes)
            mx.eval(block)
            blocks.append(block)
        coded = concatenate(blocks, axis=0)
    quantized = round_scales(coded, layer.bits, scale_dtype(w.dtype))
    return Outcome(quantized, clustering.cut_points, cluster_s)


QUANTIZERS = {
    "rtn": Quantizer(apply=_rtn),
    "imatrix": Quantizer(apply=_imatrix, statistic=sum_of_squares),
    "gptq": Quantizer(apply=_gptq, statistic=hessian),
    "lut": Quantizer(apply=_lut, statistic=hessian),
    "salience": Quantizer(apply=_salience, statistic=hessian),
    "omniquant": Quantizer(apply=_learned),
    "efficientqat": Quantizer(apply=_learned),
    "splitquant": Quantizer(apply=_splitquant),
    "splitquant_imatrix": Quantizer(apply=_splitquant, statistic=sum_of_squares),
}


def uses_cpu(quantizer: str) -> bool:
    """Return whether a quantizer computes with numpy on every default device."""
    return quantizer in OWN_LAYERS or (quantizer == "gptq" and not kernel_works())
