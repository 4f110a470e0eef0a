"""Show that the memory of a conversion does not grow with the number of layers."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from splitquant_mlx.bench.conversion import run_conversion
from splitquant_mlx.bench.programs import OURS
from splitquant_mlx.environment import describe_machine, versions
from splitquant_mlx.progress import Progress, Silent
from splitquant_mlx.random_checkpoint import SHAPES, Shape, write_random_checkpoint


def bench_memory(
    shape: Shape,
    layers: Sequence[int],
    scratch: Path,
    *,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert random checkpoints of one shape and several depths, with the default recipe.

    Args:
        shape: of the model, but for its depth.
        layers: depths.
        scratch: an existing directory, for one checkpoint and its conversion at a time.
        dtype: of the checkpoints.
        progress: told how far the work is.

    Returns:
        JSON values: for each depth the size of the checkpoint, the peak resident memory of the
        process and its seconds; `floor_bytes`, the same peak for a model of 0.3 M parameters,
        which is what Python and its libraries take; `growth`, the largest peak over the smallest,
        and `growth_above_floor`, that with the floor taken off both; and the environment.

    Raises:
        SplitQuantError: when a conversion fails.
    """
    progress = progress or Silent()
    shapes = [SHAPES["tiny"], *(replace(shape, num_hidden_layers=depth) for depth in layers)]
    found = []
    with progress.task("Converting", len(shapes)) as advance:
        for number, sizes in enumerate(shapes):
            model, target = scratch / f"model-{number}", scratch / "converted"
            write_random_checkpoint(model, sizes, dtype=dtype)
            nbytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            command = [*OURS, "convert", "--model", str(model), "--mlx-path", str(target)]
            run, _ = run_conversion(command, target)
            shutil.rmtree(model)
            found.append(
                {
                    "layers": sizes.num_hidden_layers,
                    "source_bytes": nbytes,
                    "peak_bytes": run.peak_bytes,
                    "seconds": run.seconds,
                }
            )
            advance(1)
    floor, *runs = found
    peaks = [run["peak_bytes"] for run in runs]
    floor_bytes = floor["peak_bytes"]
    return {
        "shape": {**asdict(shape), "num_hidden_layers": list(layers)},
        "dtype": dtype,
        "floor_bytes": floor_bytes,
        "runs": runs,
        "growth": max(peaks) / min(peaks),
        "growth_above_floor": (max(peaks) - floor_bytes) / (min(peaks) - floor_bytes),
        "machine": describe_machine(),
        "versions": versions(),
    }
