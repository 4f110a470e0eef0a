"""Offer `bench memory`."""

import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from splitquant_mlx.cli.bench.output import named_shape
from splitquant_mlx.cli.console import check_json, new_table, show, size, write_json
from splitquant_mlx.cli.options import JsonFile, start
from splitquant_mlx.errors import RecipeError


def memory(
    shape: Annotated[str, typer.Option(help="Of the model, as for make-checkpoint.")] = "deep",
    layers: Annotated[list[int], typer.Option(help="A depth; repeatable.")] = [16, 32, 64],  # noqa: B006
    trials: Annotated[int, typer.Option(help="Conversions of each depth.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Measure the peak memory of conversions of random models of several depths."""
    check_json(json_file)
    if min(layers) < 1:
        raise RecipeError(f"--layers: wanted 1 or more, got {min(layers)}")
    start(None)

    from splitquant_mlx.bench.memory import bench_memory
    from splitquant_mlx.cli.progress import Bars

    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as scratch:
        found = bench_memory(
            named_shape(shape), layers, Path(scratch), trials=trials, progress=Bars()
        )
    if write_json(json_file, found):
        return
    table = new_table(shape, "source", "peak memory", "least", "most", "time")
    for run in found["runs"]:
        table.add_row(
            f"{run['layers']} layers",
            size(run["source_bytes"]),
            *(size(of(run["peak_runs_bytes"])) for of in (median, min, max)),
            f"{median(run['seconds']):.1f} s",
        )
    show(table)
    show(
        f"largest over smallest: {found['growth']:.3f}; without the {size(found['floor_bytes'])} "
        f"of Python and its libraries: {found['growth_above_floor']:.3f}"
    )
