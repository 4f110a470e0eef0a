"""Estimate what a conversion will come to, before it: size, bits/weight, memory and time.

Sizes follow from the plan. Memory is a model of what the stages hold. Time is extrapolated from
pieces of one layer that are quantized, and one matrix product that is computed, on this machine: it
tells minutes from hours, not more. Where the model itself is run, to calibrate, only its products
are counted: that is the least it can take, and of a model of a million parameters, where a call
costs more than a product, a small part of it.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.calibration.statistics import hessian
from splitquant_mlx.conversion.budget import find_budget, measure_sizes
from splitquant_mlx.conversion.converter import source_array
from splitquant_mlx.conversion.plan import LayerPlan, make_plan
from splitquant_mlx.conversion.quantizers import QUANTIZERS, uses_cpu
from splitquant_mlx.conversion.weight import convert_weight
from splitquant_mlx.inspection.conversion_memory import converting_bytes
from splitquant_mlx.models.checkpoint import open_checkpoint, parameters
from splitquant_mlx.recipe import LEARNED, Calibration, Recipe

FEW_ROWS, MANY_ROWS, WIDTH = 64, 512, 2048  # of the pieces of a layer that are timed
SIDE = 1024  # of the product that is timed
SENSITIVITY_TOKENS = 4096  # of auto
# forward passes over the calibration text: sampling, measuring and statistics; over sensitivity's,
# with gradients; over the training text, with gradients and the original's; a pass of learning
PASSES = {"calibrate": 3, "sensitivity": 4, "refine": 5, "learn": 3}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a conversion is expected to come to.

    Attributes:
        layers: what is planned for each layer.
        parameters: of the model.
        source_bytes: size of the original's tensors.
        stored_bytes: size of the converted model's tensors.
        memory_bytes: peak.
        seconds: time of the whole conversion, s; rough, and the least where it runs the model.
        explanation: how the size was computed, one line; empty where the target is the size.
    """

    layers: tuple[LayerPlan, ...]
    parameters: int
    source_bytes: int
    stored_bytes: float
    memory_bytes: float
    seconds: float
    explanation: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Return stored bits over original entries, of the whole model."""
        return 8 * self.stored_bytes / self.parameters


def estimate(directory: Path, recipe: Recipe) -> Estimate:
    """Estimate the conversion of a model directory by a recipe; one small piece is computed.

    Raises:
        SplitQuantError: as the conversion would.
    """
    checkpoint = open_checkpoint(directory)
    sizes = {name: array.size for name, array in parameters(checkpoint.model).items()}
    planned = recipe.without_target() if recipe.method == "auto" else recipe
    plan = make_plan(planned, checkpoint.model, checkpoint.config)
    arrays = {name: source_array(checkpoint, plan.dtype, name) for name in checkpoint.weights}
    tensors = plan.tensors(arrays)
    stored = float(sum(dtype.size * math.prod(shape) for dtype, shape in tensors.values()))
    explanation = ""
    if recipe.method == "auto":
        choice = measure_sizes(recipe, checkpoint)
        budget = find_budget(recipe, choice, checkpoint)
        explanation = budget.explanation
        if budget.total_bytes is not None:
            stored = min(budget.total_bytes, choice.most_bytes)
    total = sum(sizes.values())
    return Estimate(
        layers=tuple(plan.layers.values()),
        parameters=total,
        source_bytes=checkpoint.source_bytes,
        stored_bytes=stored,
        memory_bytes=converting_bytes(sizes, recipe),
        seconds=_seconds(plan.layers.values(), arrays, recipe, total),
        explanation=explanation,
    )


def _seconds(layers: Any, arrays: dict[str, mx.array], recipe: Recipe, parameters: int) -> float:
    seconds = 2 + 3e-9 * sum(array.nbytes for array in arrays.values())
    shapes = [layer.shape for layer in layers if layer.action != "keep" and len(layer.shape) > 1]
    matrices = [layer for layer in layers if layer.action != "keep" and len(layer.shape) == 2]
    if matrices:
        sample = sorted(matrices, key=lambda layer: math.prod(layer.shape))[len(matrices) // 2]
        time_of = _time_of(sample, arrays[f"{sample.path}.weight"])
        in_threads = mx.default_device() == mx.cpu or uses_cpu(sample.quantizer)
        seconds += sum(map(time_of, shapes)) / ((os.cpu_count() or 1) if in_threads else 1)
        if recipe.method == "auto":  # its options, on a sample of each layer's rows
            seconds += 2 * sum(time_of((min(256, out), width)) for *_, out, width in shapes)
    if recipe.runs_the_model:
        text = recipe.calibration or Calibration()
        tokens = PASSES["calibrate"] * text.num_samples * text.sequence_length
        if recipe.method == "auto":
            tokens += PASSES["sensitivity"] * SENSITIVITY_TOKENS
        if recipe.method in LEARNED:
            passes = PASSES["learn"] * (recipe.sweeps or 0)
            tokens += passes * text.num_samples * text.sequence_length
        if recipe.refine:
            tokens += PASSES["refine"] * 4 * text.num_samples * text.sequence_length
        seconds += 2 * parameters * tokens / _products_per_s()
    return seconds


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


def _products_per_s() -> float:
    """Return the floating-point operations of a matrix product in a second."""
    x = mx.random.normal((SIDE, SIDE), key=mx.random.key(0))
    mx.eval(x)
    return 2 * SIDE**3 / _timed(lambda: mx.eval(x @ x))


def _timed(work: Callable[[], object]) -> float:
    """Return the shorter time of two runs, s."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
