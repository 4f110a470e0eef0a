"""Time a calibrated conversion against the arithmetic that it cannot do without.

The bound counts the products of matrices of `gptq`: with N weights of linear layers in blocks, V h
of the output head, T calibration tokens and d the width of each distinct layer input, sampling
takes 2 T (N + V h) operations, the forward pass 2 T N, the Hessians T sum(d^2) (a symmetric
product), the rounding 5 sum(out in^2). Of a mixture's experts, N and the Hessians count those that
a token goes to. Divided by the rate of float32 products that the
machine reaches in the same run, before and after the conversion, that is a time.
"""

import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from splitquant_mlx.calibration.blocks import is_expert_stack, start_pass, taken, tapped
from splitquant_mlx.conversion.pipeline import convert
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.progress import SILENT, Advance, Progress
from splitquant_mlx.recipe import Calibration, Recipe
from splitquant_mlx.runtime.environment import made_with

SIZE = 2048  # of the matrices whose product is timed
ROUNDING = 5  # operations an entry and channel: half a product, then one in each of two sweeps


class Stages:
    """A progress reporter that notes time and peak memory of every task, and passes them on."""

    def __init__(self, shown: Progress):
        self.found: list[dict[str, Any]] = []
        self._shown = shown

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Advance]:
        """Note a task."""
        _reset_peak()
        started = time.perf_counter()
        with self._shown.task(label, total) as advance:
            yield advance
        seconds = time.perf_counter() - started
        self.found.append({"stage": label, "seconds": seconds, "peak_bytes": peak_bytes()})

    def note(self, text: str) -> None:
        """Pass a line on."""
        self._shown.note(text)


def bench_calibrated(
    model: Path,
    scratch: Path,
    *,
    recipe: Recipe | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Convert `model` in this process, from a cold cache of this package's.

    Args:
        model: a model directory.
        scratch: an existing directory, for the cache and the output, which are removed.
        recipe: a calibrated one; None is gptq with 4 bits.
        progress: progress reporter.

    Returns:
        JSON values: operations by stage, rates in operations/s, bound, wall time in s, their ratio,
        time and peak memory in bytes of every stage, and the environment. On Linux the peak is each
        stage's own, elsewhere the process's up to its end.

    Raises:
        SplitQuantError: when the conversion fails.
    """
    recipe = recipe or Recipe(method="gptq")
    work = count_operations(model, recipe.texts)
    stages = Stages(progress)
    before = product_rate()
    with TemporaryDirectory(dir=scratch, prefix=".bench-") as room, _cache_in(Path(room)):
        started = time.perf_counter()
        manifest = convert(model, Path(room) / "target", recipe=recipe, progress=stages)
        wall_s = time.perf_counter() - started
    rate = (before + product_rate()) / 2
    bound_s = sum(work.values()) / rate
    return {
        "model": model.name,
        "recipe": recipe.to_dict(),
        "operations": work,
        "product_rate": rate,
        "bound_s": bound_s,
        "wall_s": wall_s,
        "ratio": wall_s / bound_s,
        "stages": stages.found,
        "seconds": manifest.seconds,
        "peak_bytes": max(stage["peak_bytes"] for stage in stages.found),
        "source_bytes": manifest.source_bytes,
        **made_with(),
    }


def count_operations(model: Path, calibration: Calibration) -> dict[str, float]:
    """Return the operations of each stage of gptq; see the module."""
    tokens = calibration.num_samples * calibration.sequence_length
    run = start_pass(lambda: load_model(model, lazy=True), np.zeros((1, 2), np.int32))
    weights, squares, rounding = 0, 0, 0.0
    for index, block in enumerate(run.blocks):
        layers = [
            path
            for path, module in block.named_modules()
            if type(module) is nn.Linear or is_expert_stack(module)
        ]
        inputs: dict[int, int] = {}
        with tapped(block, layers) as taps:
            run.advance(index)
            for path, seen in taken(taps).items():
                experts = 1 if seen.routes is None else seen.routes.shape[-1]  # of each token
                weight = taps[path].layer.weight
                weights += experts * math.prod(weight.shape[-2:])
                rounding += ROUNDING * weight.size * weight.shape[-1]
                inputs[id(seen.given)] = experts * weight.shape[-1] ** 2
        run.release(index)
        squares += sum(inputs.values())
    head = max(array.size for array in _outer_weights(run.model))
    return {
        "sampling": 2.0 * tokens * (weights + head),
        "forward": 2.0 * tokens * weights,
        "hessians": float(tokens * squares),
        "rounding": rounding,
    }


def _outer_weights(model: nn.Module) -> list[mx.array]:
    """Return the weights of embedding and head."""
    return [
        module.weight
        for path, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.Linear)) and ".layers." not in path
    ]


def product_rate() -> float:
    """Return the best rate of float32 products on the default device, operations/s."""
    a = mx.random.normal((SIZE, SIZE))
    mx.eval(a @ a)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        mx.eval(a @ a)
        seconds.append(time.perf_counter() - started)
    return 2 * SIZE**3 / min(seconds)


def peak_bytes() -> int:
    """Return the peak of this process's memory since the last reset, bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass


@contextmanager
def _cache_in(directory: Path) -> Iterator[None]:
    before = os.environ.get("SPLITQUANT_CACHE")
    os.environ["SPLITQUANT_CACHE"] = str(directory / "cache")
    try:
        yield
    finally:
        del os.environ["SPLITQUANT_CACHE"]
        if before is not None:
            os.environ["SPLITQUANT_CACHE"] = before
