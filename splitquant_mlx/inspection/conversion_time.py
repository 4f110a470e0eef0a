"""Estimate the time of a conversion by timing small parts of it on this machine.

Two pieces of one layer's weight are quantized. If the recipe runs the original, its first block
computes a few texts, and one token of many texts as in sampling; the other blocks are assumed to
take as long. Measured factors account for gradients, keys and values. The result is accurate within
a factor of about three.

On a CPU the parts run in one thread and are timed in CPU time, which other programs hardly affect;
the result is divided by the number of cores in use, except for learned methods, which are not
computed in parallel.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from threadpoolctl import ThreadpoolController

from splitquant_mlx.calibration.blocks import start_pass
from splitquant_mlx.calibration.self_text import BATCH_TEXTS
from splitquant_mlx.calibration.sums import hessian
from splitquant_mlx.conversion.bits import TOKENS as SENSITIVITY_TOKENS
from splitquant_mlx.conversion.plan import LayerPlan
from splitquant_mlx.conversion.quantizers import QUANTIZERS, uses_cpu
from splitquant_mlx.conversion.refine import training_texts
from splitquant_mlx.conversion.weight import convert_weight
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.recipe import LEARNED, SELF, Recipe
from splitquant_mlx.runtime.cores import cores

FEW_ROWS, MANY_ROWS, WIDTH = 64, 512, 2048  # size of the timed pieces of a weight
SIDE = 1024  # of the timed matrix product
TOKENS = 512  # number of tokens to time a block with
LONG_S = 2.0  # longer runs are not repeated
OPTIONS = 2  # time of a layer's options of auto, relative to its quantizer
DRAW_S = 14e-9  # time per vocabulary entry to draw a token on a CPU
# Cost factors measured on models of 0.3 and 135 million parameters: a sampling step relative to the
# blocks without KV cache, and the forward passes per token of sensitivities, of a learning pass
# (small model only) and of refinement (4 to 13). With them the estimates for every method were 1.0
# to 2.7 times the measured times on two models of 0.3 and 0.5 million parameters.
SAMPLING, SENSITIVITY, LEARNING, REFINING = 1.5, 10.0, 2.0, 7.0
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class RunTimes:
    """Times of the parts of running a model; on a CPU, in one thread, s.

    Attributes:
        token: all blocks, per token of a text.
        step: all blocks, per next token when sampling `BATCH_TEXTS` texts in a batch; larger models
            sample fewer texts at a time.
        head: the head, per token.
        draw: drawing a token.
        product: one multiply-add of a matrix product.
    """

    token: float
    step: float
    head: float
    draw: float
    product: float


def conversion_seconds(
    directory: Path, layers: Sequence[LayerPlan], arrays: dict[str, mx.array], recipe: Recipe
) -> float:
    """Estimate the time of a conversion, s, by running parts of it.

    Args:
        directory: model directory of the original.
        layers: plan of each layer.
        arrays: weights of the original by name.
        recipe: recipe of the conversion.

    Raises:
        RecipeError: when the recipe runs a model that does not consist of blocks.
    """
    seconds = 2 + 3e-9 * sum(array.nbytes for array in arrays.values())
    converted = [layer for layer in layers if layer.action != "keep" and len(layer.shape) > 1]
    with ThreadpoolController().limit(limits=1) if _on_cpu() else nullcontext():
        if matrices := [layer for layer in converted if len(layer.shape) == 2]:
            sample = sorted(matrices, key=lambda layer: math.prod(layer.shape))[len(matrices) // 2]
            w = arrays[f"{sample.path}.weight"]
            seconds += _quantizing_seconds(sample, w, converted, recipe)
        if recipe.runs_the_model:
            times = _run_times(directory, layers, recipe)
            seconds += _running_seconds(times, converted, recipe)
    return seconds


def _quantizing_seconds(
    sample: LayerPlan, w: mx.array, layers: Sequence[LayerPlan], recipe: Recipe
) -> float:
    """Return the time to quantize all layers, s, from that of one sample layer with weight `w`."""
    seconds_by_shape = _quantizer_model(sample, w)
    in_threads = _on_cpu() or uses_cpu(sample.quantizer)
    seconds = sum(seconds_by_shape(layer.shape) for layer in layers)
    if recipe.method == "auto":  # measures its options on some rows of each layer
        rows = [(min(256, layer.shape[-2]), layer.shape[-1]) for layer in layers]
        seconds += OPTIONS * sum(map(seconds_by_shape, rows))
    return seconds / ((os.cpu_count() or 1) if in_threads else 1)


def _running_seconds(times: RunTimes, layers: Sequence[LayerPlan], recipe: Recipe) -> float:
    """Return the time to run the original and to collect input statistics of its layers, s."""
    text = recipe.texts
    tokens = text.texts_for() * text.sequence_length
    calibrating = tokens if recipe.calibration is not None and recipe.method != "rtn" else 0
    training = training_texts(text)
    refining = training.texts_for() * text.sequence_length if recipe.refine else 0
    parallel_s = calibrating * times.token
    if text.text == SELF:
        sampling = SAMPLING * times.step + times.head + times.draw
        parallel_s += (calibrating + refining) * sampling
    if any(QUANTIZERS[layer.quantizer].statistic is hessian for layer in layers):
        # layers of one module with equal width share a Hessian
        inputs = {(layer.path.rpartition(".")[0], layer.shape[-1]) for layer in layers}
        parallel_s += tokens * times.product / 2 * sum(width**2 for _, width in inputs)
    if recipe.method == "auto":
        parallel_s += SENSITIVITY * SENSITIVITY_TOKENS * (times.token + times.head)
    parallel_s += REFINING * refining * (times.token + times.head)
    serial_s = 0.0
    if recipe.method in LEARNED:
        serial_s = LEARNING * (recipe.sweeps or 0) * tokens * times.token
    return parallel_s / cores() + serial_s


def _run_times(directory: Path, layers: Sequence[LayerPlan], recipe: Recipe) -> RunTimes:
    """Time a model's first block and a matrix product."""
    length = recipe.texts.sequence_length
    token_times = []
    for texts in ((max(1, TOKENS // length), length), (BATCH_TEXTS, 1)):
        tokens = np.zeros(texts, np.int32)
        load = partial(load_model, directory, lazy=True, dequantize=True)
        run = start_pass(load, tokens, tokens.size)
        mx.eval(run.blocks[0].parameters())
        block = _timed(lambda run=run: mx.eval(run.run(0, 0, run.states[0])))
        token_times.append(block * len(run.blocks) / tokens.size)
    product = product_s(SIDE)
    heads = [layer.shape for layer in layers if layer.kind in ("embedding", "lm_head")]
    vocabulary, width = max(heads, default=(0, 0))
    return RunTimes(
        token=token_times[0],
        step=token_times[1],
        head=vocabulary * width * product,
        draw=vocabulary * DRAW_S if _on_cpu() else 0.0,
        product=product,
    )


def _quantizer_model(layer: LayerPlan, w: mx.array) -> Callable[[Sequence[int]], float]:
    """Return a function from the shape of a weight to the time of the layer's quantizer, s.

    Times two pieces of `w` for a fixed time per layer and a time per row. Both grow with the width,
    or with its square if the quantizer uses a Hessian.
    """
    if layer.quantizer in LEARNED:  # rounds the learned weights as rtn does
        layer = dataclasses.replace(layer, quantizer="rtn")
    statistic, width = QUANTIZERS[layer.quantizer].statistic, min(WIDTH, layer.shape[-1])
    inputs = None
    if statistic is not None:
        inputs = mx.eye(width) if statistic is hessian else mx.ones(width)

    def timed(count: int) -> float:
        rows = w[:count, :width]
        mx.eval(rows)
        piece = dataclasses.replace(layer, shape=tuple(rows.shape))
        return _timed(lambda: convert_weight(rows, piece, inputs))

    few, many = min(FEW_ROWS, len(w)), min(MANY_ROWS, len(w))
    short = timed(few)
    row = max(0.0, timed(many) - short) / (many - few) if many > few else short / few
    fixed, power = max(0.0, short - few * row), 2 if statistic is hessian else 1

    def seconds_by_shape(shape: Sequence[int]) -> float:
        *stack, rows, columns = shape
        return math.prod(stack) * (fixed + row * rows) * (columns / width) ** power

    return seconds_by_shape


def product_s(side: int, clock: Clock | None = None) -> float:
    """Return the time of one multiply-add of float32 (side, side) matrices, s; see `_timed`."""
    x = mx.random.normal((side, side), key=mx.random.key(0))
    mx.eval(x)
    return _timed(lambda: mx.eval(x @ x), clock) / side**3


def _timed(run: Callable[[], object], clock: Clock | None = None) -> float:
    """Return the shortest time of up to three runs, s: CPU time on a CPU, else wall time."""
    clock = clock or (time.process_time if _on_cpu() else time.perf_counter)
    times = []
    for _ in range(3):
        started = clock()
        run()
        times.append(clock() - started)
        if times[-1] > LONG_S:
            break
    return min(times)


def _on_cpu() -> bool:
    return mx.default_device() == mx.cpu
