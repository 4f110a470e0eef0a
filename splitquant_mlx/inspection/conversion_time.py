"""Estimate how long a conversion takes, from small parts of it that are computed on this machine.

Two pieces of a layer's weight are quantized. Where the original is run, its first block computes a
few texts, and one token of many texts, as sampling does; the other blocks are taken to be alike,
and to what cannot be run so quickly (gradients, keys and values) go factors that were measured.
That tells two minutes from ten, not more.

On a CPU, parts are timed by the processor time of one thread, which other programs do not lengthen.
It is divided by the number of cores that have a part of the work each.
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
from splitquant_mlx.calibration.statistics import hessian
from splitquant_mlx.conversion.plan import LayerPlan
from splitquant_mlx.conversion.quantizers import QUANTIZERS, uses_cpu
from splitquant_mlx.conversion.refine import TEXTS_PER_SAMPLE
from splitquant_mlx.conversion.weight import convert_weight
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.recipe import LEARNED, SELF, Recipe
from splitquant_mlx.runtime.cores import cores

FEW_ROWS, MANY_ROWS, WIDTH = 64, 512, 2048  # of the pieces of a layer that are timed
SIDE = 1024  # of the product that is timed
TOKENS = 512  # that the block is timed with
LONG_S = 2.0  # of a part that is not timed again
SENSITIVITY_TOKENS = 4096  # of auto
OPTIONS = 2  # of auto: what those of a layer cost, beside a quantizer
DRAW_S = 14e-9  # an entry of the vocabulary, when a token is drawn on a CPU
# Measured on models of 0.3 and 135 million parameters: a step of sampling beside a call of the
# blocks without keys and values, forward passes that a token of sensitivities costs, that one of a
# pass of learning costs (on the small one alone), and one of refinement (4 to 13). With them the
# whole of every method was 1.0 to 2.7 times its time on two models of 0.3 and 0.5 million.
SAMPLING, SENSITIVITY, LEARNING, REFINING = 1.5, 16.0, 2.0, 10.0


@dataclass(frozen=True, kw_only=True)
class RunTimes:
    """What it takes to run a model, s.

    Attributes:
        token: all blocks, for a token of a text.
        step: all blocks, for the next token of one of `BATCH_TEXTS` texts.
        head: the head, for a token.
        draw: drawing a token.
        product: a multiplication and an addition in a matrix product.
    """

    token: float
    step: float
    head: float
    draw: float
    product: float


def conversion_seconds(
    directory: Path, layers: Sequence[LayerPlan], arrays: dict[str, mx.array], recipe: Recipe
) -> float:
    """Estimate the time of a conversion, s; parts of it are computed.

    Args:
        directory: the original's.
        layers: what is planned for each.
        arrays: the original's weights by name.
        recipe: of the conversion.

    Raises:
        RecipeError: when the recipe runs a model that is not built of blocks.
    """
    seconds = 2 + 3e-9 * sum(array.nbytes for array in arrays.values())
    changed = [layer for layer in layers if layer.action != "keep" and len(layer.shape) > 1]
    with ThreadpoolController().limit(limits=1) if _on_cpu() else nullcontext():
        if matrices := [layer for layer in changed if len(layer.shape) == 2]:
            sample = sorted(matrices, key=lambda layer: math.prod(layer.shape))[len(matrices) // 2]
            seconds += _quantizing(sample, arrays[f"{sample.path}.weight"], changed, recipe)
        if recipe.runs_the_model:
            seconds += _running(_run_times(directory, layers, recipe), changed, recipe)
    return seconds


def _quantizing(
    sample: LayerPlan, w: mx.array, layers: Sequence[LayerPlan], recipe: Recipe
) -> float:
    """Return the time of all layers' quantizers, s, from that of one layer."""
    time_of = _time_of(sample, w)
    in_threads = _on_cpu() or uses_cpu(sample.quantizer)
    seconds = sum(time_of(layer.shape) for layer in layers)
    if recipe.method == "auto":  # its options, on a sample of each layer's rows
        rows = [(min(256, layer.shape[-2]), layer.shape[-1]) for layer in layers]
        seconds += OPTIONS * sum(map(time_of, rows))
    return seconds / ((os.cpu_count() or 1) if in_threads else 1)


def _running(times: RunTimes, layers: Sequence[LayerPlan], recipe: Recipe) -> float:
    """Return the time to run the original, and to measure what its layers are fed, s."""
    text = recipe.texts
    tokens = text.num_samples * text.sequence_length
    calibrating = tokens if recipe.calibration is not None and recipe.method != "rtn" else 0
    refining = TEXTS_PER_SAMPLE * tokens if recipe.refine else 0
    seconds = calibrating * times.token
    if text.text == SELF:
        sampling = SAMPLING * times.step + times.head + times.draw
        seconds += (calibrating + refining) * sampling
    if any(QUANTIZERS[layer.quantizer].statistic is hessian for layer in layers):
        fed = {(layer.path.rpartition(".")[0], layer.shape[-1]) for layer in layers}
        seconds += tokens * times.product / 2 * sum(width**2 for _, width in fed)
    if recipe.method == "auto":
        seconds += SENSITIVITY * SENSITIVITY_TOKENS * (times.token + times.head)
    if recipe.method in LEARNED:
        seconds += LEARNING * (recipe.sweeps or 0) * tokens * times.token
    return seconds + REFINING * refining * (times.token + times.head)


def _run_times(directory: Path, layers: Sequence[LayerPlan], recipe: Recipe) -> RunTimes:
    """Time a model's first block, and a product."""
    length = recipe.texts.sequence_length
    found = []
    for texts in ((max(1, TOKENS // length), length), (BATCH_TEXTS, 1)):
        tokens = np.zeros(texts, np.int32)
        load = partial(load_model, directory, lazy=True, dequantize=True)
        run = start_pass(load, tokens, tokens.size)
        mx.eval(run.blocks[0].parameters())
        alone = _timed(lambda run=run: mx.eval(run.run(0, 0, run.states[0])))
        found.append(alone * len(run.blocks) / tokens.size / cores())
    product = _product_s() / cores()
    heads = [layer.shape for layer in layers if layer.kind in ("embedding", "lm_head")]
    vocabulary, width = max(heads, default=(0, 0))
    return RunTimes(
        token=found[0],
        step=found[1],
        head=vocabulary * width * product,
        draw=vocabulary * DRAW_S / cores() if _on_cpu() else 0.0,
        product=product,
    )


def _time_of(layer: LayerPlan, w: mx.array) -> Callable[[Sequence[int]], float]:
    """Return a function from the shape of a weight to the time that a layer's quantizer takes, s.

    Two pieces of `w` are timed, for what a layer costs by itself and what a row adds to it. Both
    grow with the width, and with its square where there is a Hessian.
    """
    if layer.quantizer in LEARNED:  # which rounds, as rtn does, what was learned
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
    alone, power = max(0.0, short - few * row), 2 if statistic is hessian else 1

    def time_of(shape: Sequence[int]) -> float:
        *stack, out, wide = shape
        return math.prod(stack) * (alone + row * out) * (wide / width) ** power

    return time_of


def _product_s() -> float:
    """Return the time of a multiplication and an addition in a product of float32 matrices, s."""
    x = mx.random.normal((SIDE, SIDE), key=mx.random.key(0))
    mx.eval(x)
    return _timed(lambda: mx.eval(x @ x)) / SIDE**3


def _timed(work: Callable[[], object]) -> float:
    """Return the shortest time of three runs, or that of a long one, s: on a CPU, of processors."""
    clock = time.process_time if _on_cpu() else time.perf_counter
    times = []
    for _ in range(3):
        started = clock()
        work()
        times.append(clock() - started)
        if times[-1] > LONG_S:
            break
    return min(times)


def _on_cpu() -> bool:
    return mx.default_device() == mx.cpu
