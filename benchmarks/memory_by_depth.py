"""Show that the memory of a conversion does not grow with the number of layers.

python benchmarks/memory_by_depth.py docs/memory.json
"""

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from splitquant_mlx.bench.conversion import run_conversion
from splitquant_mlx.bench.programs import OURS
from splitquant_mlx.bench.random_checkpoint import SHAPES, Shape, write_random_checkpoint
from splitquant_mlx.cli.progress import Bars
from splitquant_mlx.progress import SILENT, Advance, Progress
from splitquant_mlx.runtime.environment import made_with


def bench_memory(
    shape: Shape,
    layers: Sequence[int],
    scratch: Path,
    *,
    trials: int = 3,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Convert random checkpoints of one shape and several depths, with the default recipe.

    Args:
        shape: of the model, but for its depth.
        layers: depths.
        scratch: an existing directory, for one checkpoint and its conversion at a time.
        trials: conversions of each. Which weights are in memory at once depends on how the threads
            happen to be scheduled, so that the peaks of one checkpoint differ by some percent.
        progress: told how far the work is.

    Returns:
        JSON values: for each depth the size of the checkpoint, and of the peak resident memory of
        the process, and its seconds, all runs; `peak_bytes`, their median peak; `floor_bytes`, that
        of a model of 0.3 M parameters, which is what Python and its libraries take; `growth`, the
        largest median peak over the smallest, and `growth_above_floor`, that with the floor taken
        off both; and the environment.

    Raises:
        RecipeError: when there is nothing to measure.
        SplitQuantError: when a conversion fails.
    """
    shapes = [SHAPES["tiny"], *(replace(shape, num_hidden_layers=depth) for depth in layers)]
    found = []
    with progress.task("Converting", trials * len(shapes)) as advance:
        for sizes in shapes:
            model = scratch / f"model-{sizes.num_hidden_layers}-{sizes.hidden_size}"
            write_random_checkpoint(model, sizes)
            found.append({"layers": sizes.num_hidden_layers, **_peaks(model, trials, advance)})
            shutil.rmtree(model)
    floor, *depths = found
    peaks = [depth["peak_bytes"] for depth in depths]
    floor_bytes = floor["peak_bytes"]
    return {
        "shape": {**asdict(shape), "num_hidden_layers": list(layers)},
        "dtype": "bfloat16",
        "floor_bytes": floor_bytes,
        "runs": depths,
        "growth": max(peaks) / min(peaks),
        "growth_above_floor": (max(peaks) - floor_bytes) / (min(peaks) - floor_bytes),
        **made_with(),
    }


def _peaks(model: Path, trials: int, advance: Advance) -> dict[str, Any]:
    """Convert a checkpoint several times: its size, and peak memory and seconds of each time."""
    target, runs = model.parent / "converted", []
    command = [*OURS, "convert", "--model", str(model), "--mlx-path", str(target)]
    for _ in range(trials):
        runs.append(run_conversion(command, target)[0])
        advance(1)
    return {
        "source_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "peak_bytes": statistics.median(run.peak_bytes for run in runs),
        "peak_runs_bytes": [run.peak_bytes for run in runs],
        "seconds": [run.seconds for run in runs],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as scratch:
        measured = bench_memory(SHAPES["deep"], [16, 32, 64], Path(scratch), progress=Bars())
    Path(sys.argv[1]).write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
