"""The quantizers by name: each makes codes, scales and biases of a weight, as its plan says.

A new method is a function here, its entry in `QUANTIZERS`, and the rule in `plan` that chooses it.
"""

import math
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import current_thread
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from splitquant_mlx.calibration.statistics import (
    ExpertMeans,
    Mean,
    Statistic,
    hessian,
    sum_of_squares,
)
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

Stored = Quantized | Lut | Mixed
# names of their tensors, each once
LEAVES = tuple(dict.fromkeys((*Quantized._fields, *Lut._fields, *Mixed._fields)))
BLOCK = 1 << 19  # entries
LARGE = 1 << 24  # entries that one core is not left alone with
HELPER = "helper"  # begins the names of the threads that share a large weight


class Outcome(NamedTuple):
    """Result of a quantizer.

    Attributes:
        quantized: codes, scales and biases; of a split weight, the parts side by side.
        cut_points: of a split weight, ascending; none of a stack of experts.
        cluster_s: time of the clustering, s.
    """

    quantized: Stored
    cut_points: tuple[float, ...] = ()
    cluster_s: float = 0.0


Apply = Callable[[mx.array, LayerPlan, Mean | None], Outcome]


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """One way to quantize a weight.

    Attributes:
        apply: makes an `Outcome` of a weight (..., out, in), its plan, and the mean of the
            statistic over the layer's inputs, None where there is no `statistic`. Raises
            ValueError for a weight that it cannot quantize.
        statistic: of the layer's inputs, which it needs; None where it needs none.
    """

    apply: Apply
    statistic: Statistic | None = None


def _rtn(w: mx.array, layer: LayerPlan, inputs: Mean | None) -> Outcome:
    """Round to nearest, on all cores where one would be at it when all other layers are done."""

    def rounded(rows: mx.array) -> Quantized:
        found = quantize(
            rows,
            bits=layer.bits,
            group_size=layer.group_size,
            granularity=layer.granularity,
            mode=layer.mode,
        )
        mx.eval([array for array in found if array is not None])
        return found

    apart = w.ndim == 2 and layer.granularity != "tensor" and mx.default_device() == mx.cpu
    if not apart or w.size <= LARGE:
        return Outcome(rounded(w))
    rows = max(1, LARGE // w.shape[1])
    spread = _spread(w.size, on_cpu=True)
    pieces = spread(lambda start: rounded(w[start : start + rows]), range(0, len(w), rows))
    return Outcome(concatenate(list(pieces), axis=0))


@cache
def _helpers() -> ThreadPoolExecutor:
    """Return threads that stay, as mlx keeps something for each in which it computes."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=HELPER)


def _spread(size: int, *, on_cpu: bool) -> Callable[..., Iterable[Any]]:
    """Return `map`; for a large weight one on all cores, if this thread is not one of those."""
    helping = current_thread().name.startswith(HELPER)
    return _helpers().map if on_cpu and size > LARGE and not helping else map


def is_large_stack(layer: LayerPlan) -> bool:
    """Return whether a layer is a stack of experts of which one at a time is to be in memory."""
    return len(layer.shape) == 3 and math.prod(layer.shape) > LARGE


def _per_expert(apply: Callable[[mx.array, LayerPlan, mx.array | None], Outcome]) -> Apply:
    """Return `apply` for stacks (experts, out, in), too; experts of a large one go to all cores."""

    def applied(w: mx.array, layer: LayerPlan, inputs: Mean | None) -> Outcome:
        if w.ndim == 2:
            assert not isinstance(inputs, ExpertMeans)
            return apply(w, layer, inputs)

        def of_expert(expert: int) -> Outcome:
            own = apply(w[expert], layer, None if inputs is None else inputs[expert])
            mx.eval([array for array in own.quantized if array is not None])
            return own

        spread = _spread(w.size, on_cpu=mx.default_device() == mx.cpu)
        found = list(spread(of_expert, range(len(w))))
        arrays = zip(*(own.quantized for own in found), strict=True)
        stacked = Quantized(*(mx.stack(list(each)) for each in arrays))
        return Outcome(stacked, cluster_s=sum(own.cluster_s for own in found))

    return applied


@_per_expert
def _imatrix(w: mx.array, layer: LayerPlan, inputs: mx.array | None) -> Outcome:
    assert inputs is not None
    return Outcome(quantize_weighted(w, inputs, bits=layer.bits, group_size=layer.group_size))


@_per_expert
def _gptq(w: mx.array, layer: LayerPlan, inputs: mx.array | None) -> Outcome:
    sizes = {"bits": layer.bits, "group_size": layer.group_size}
    assert inputs is not None
    spread = _spread(w.size, on_cpu=not kernel_works())
    return Outcome(gptq_quantize(w, inputs, **sizes, sweeps=layer.sweeps, map_blocks=spread))


def _lut(w: mx.array, layer: LayerPlan, inputs: Mean | None) -> Outcome:
    settings = {"bits": layer.bits, "outliers": layer.outliers, "sweeps": layer.sweeps}
    powers = layer.codebook == "powers"
    return Outcome(lut_quantize(w, np.array(inputs), **settings, powers=powers))


def _salience(w: mx.array, layer: LayerPlan, inputs: Mean | None) -> Outcome:
    sizes = {"bits": layer.bits, "group_size": layer.group_size}
    return Outcome(salience_quantize(w, np.array(inputs), **sizes, sweeps=layer.sweeps))


def _learned(w: mx.array, layer: LayerPlan, inputs: Any) -> Outcome:
    """Round what was learned of the layer, see `blockwise`; or itself, where it is in no block."""
    if inputs is None:
        return _rtn(w, layer, inputs)
    width, groups = layer.shape[-1], layer.shape[-1] // layer.group_size
    scales = inputs[:, width : width + groups].astype(w.dtype)
    biases = inputs[:, width + groups :].astype(w.dtype)
    scale, bias = (array.astype(mx.float32)[..., None] for array in (scales, biases))
    grouped = inputs[:, :width].reshape(*scales.shape, -1)
    codes = nearest_codes(grouped, scale, bias, 2**layer.bits - 1)
    return Outcome(Quantized(pack(codes.reshape(w.shape), layer.bits), scales, biases))


@_per_expert
def _splitquant(w: mx.array, layer: LayerPlan, inputs: mx.array | None) -> Outcome:
    """Split by k-means, and quantize every part; with `inputs`, under the importance of channels.

    Large weights go through in blocks of rows, whose intermediate arrays fit in the processor's
    cache and do not add to the peak of memory.
    """
    started = time.perf_counter()
    clustering = cluster_weight(w, layer.clusters, layer.kmeans)
    cluster_s = time.perf_counter() - started
    sizes = {"bits": layer.bits, "group_size": layer.group_size}
    if inputs is None and layer.granularity == "group" and mx.default_device() == mx.cpu:
        coded = code_split(w, clustering.upper_bounds, layer.clusters, **sizes)
    else:
        # one scale per tensor has to see the whole tensor
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
    """Return whether a quantizer computes with numpy, whatever the default device."""
    return quantizer in OWN_LAYERS or (quantizer == "gptq" and not kernel_works())
