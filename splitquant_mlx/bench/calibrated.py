"""Compare the time of a calibrated conversion with a lower bound from its matrix products.

The bound counts the operations of `gptq`. With N weights of linear layers in blocks, V h of the
output head, T calibration tokens and d the width of each distinct layer input, sampling takes
2 T (N + V h) operations, the forward pass 2 T N, the Hessians T sum(d^2) (a symmetric product), and
the rounding 5 sum(out in^2). In a mixture of experts, N and the Hessians count the experts that are
active per token. The bound is the number of operations divided by the rate of float32 matrix
products, measured on the same machine before and after the conversion.
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

import mlx.nn as nn
import numpy as np

from splitquant_mlx.calibration.blocks import collect_inputs, is_expert_stack, start_pass, tapped
from splitquant_mlx.conversion.pipeline import convert
from splitquant_mlx.inspection.conversion_time import product_s
from splitquant_mlx.models.architecture import widest_input
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.progress import SILENT, Advance, Progress
from splitquant_mlx.recipe import Calibration, Recipe
from splitquant_mlx.runtime.blas import release_freed_memory
from splitquant_mlx.runtime.environment import made_with

SIZE = 2048  # rows and columns of the timed matrix product
ROUNDING = 5  # operations per entry and channel: half a product, and one in each of two sweeps


class Stages:
    """A progress reporter that records time and peak memory of every task.

    Args:
        progress: progress reporter that receives the same tasks.

    Attributes:
        records: {"stage", "seconds", "peak_bytes"} of each finished task.
    """

    def __init__(self, progress: Progress):
        self.records: list[dict[str, Any]] = []
        self._progress = progress

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Advance]:
        """Record a task."""
        _reset_peak()
        start = time.perf_counter()
        with self._progress.task(label, total) as advance:
            yield advance
        seconds = time.perf_counter() - start
        self.records.append({"stage": label, "seconds": seconds, "peak_bytes": peak_bytes()})

    def note(self, text: str) -> None:
        """Pass a note to the other reporter."""
        self._progress.note(text)


def bench_calibrated(
    model: Path,
    scratch: Path,
    *,
    recipe: Recipe | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Convert `model` in this process with an empty cache.

    Args:
        model: a model directory.
        scratch: an existing directory for the cache and the output, which are removed.
        recipe: a calibrated recipe; None is gptq with 4 bits.
        progress: progress reporter.

    Returns:
        JSON values: operations by stage, the product rate in operations/s, bound and wall time in
        s, their ratio, time and peak memory in bytes of every stage, and the environment. On Linux
        the peak is that of the stage, elsewhere that of the process until the end of the stage.

    Raises:
        SplitQuantError: when the conversion fails.
    """
    recipe = recipe or Recipe(method="gptq")
    operations = count_operations(model, recipe.texts)
    release_freed_memory()
    stages = Stages(progress)
    before_s = product_s(SIZE, time.perf_counter)
    with TemporaryDirectory(dir=scratch, prefix=".bench-") as directory, _cache_in(Path(directory)):
        start = time.perf_counter()
        manifest = convert(model, Path(directory) / "target", recipe=recipe, progress=stages)
        wall_s = time.perf_counter() - start
    after_s = product_s(SIZE, time.perf_counter)
    rate = 1 / before_s + 1 / after_s  # mean of two rates, with two operations per multiply-add
    bound_s = sum(operations.values()) / rate
    return {
        "model": model.name,
        "recipe": manifest.recipe,
        "operations": operations,
        "product_rate": rate,
        "bound_s": bound_s,
        "wall_s": wall_s,
        "ratio": wall_s / bound_s,
        "stages": stages.records,
        "seconds": manifest.seconds,
        "peak_bytes": max(stage["peak_bytes"] for stage in stages.records),
        "source_bytes": manifest.source_bytes,
        **made_with(),
    }


def count_operations(model: Path, calibration: Calibration) -> dict[str, float]:
    """Return the number of operations of each stage of gptq; see the module's docstring."""
    run = start_pass(lambda: load_model(model, lazy=True), np.zeros((1, 2), np.int32))
    tokens = calibration.texts_for(widest_input(run.model)) * calibration.sequence_length
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
            for path, seen in collect_inputs(taps).items():
                experts = 1 if seen.routes is None else seen.routes.shape[-1]  # per token
                weight = taps[path].layer.weight
                weights += experts * math.prod(weight.shape[-2:])
                rounding += ROUNDING * weight.size * weight.shape[-1]
                inputs[id(seen.argument)] = experts * weight.shape[-1] ** 2
        run.release(index)
        squares += sum(inputs.values())
    head = max(
        module.weight.size
        for path, module in run.model.named_modules()
        if isinstance(module, (nn.Embedding, nn.Linear)) and ".layers." not in path
    )
    return {
        "sampling": 2.0 * tokens * (weights + head),
        "forward": 2.0 * tokens * weights,
        "hessians": float(tokens * squares),
        "rounding": rounding,
    }


def peak_bytes() -> int:
    """Return the peak memory of this process since the last reset, bytes."""
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
