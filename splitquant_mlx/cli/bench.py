"""Offer `bench make-checkpoint` and `bench convert`."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from splitquant_mlx.cli.options import start
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.recipe import DTYPES

bench = typer.Typer(no_args_is_help=True)


@bench.command("make-checkpoint")
def make_checkpoint(
    shape: Annotated[
        str, typer.Argument(help="tiny, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b or llama-3.1-70b.")
    ],
    directory: Annotated[Path, typer.Argument(help="Directory to write.")],
    layers: Annotated[int | None, typer.Option(help="Another number of layers.")] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Write a checkpoint of a well-known shape with random weights."""
    start(None)
    from splitquant_mlx.cli.console import Bars
    from splitquant_mlx.random_checkpoint import SHAPES, write_random_checkpoint

    if shape not in SHAPES:
        raise RecipeError(f"shape: wanted one of {', '.join(SHAPES)}, got {shape!r}")
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype: wanted one of {', '.join(DTYPES)}, got {dtype!r}")
    if layers is not None and layers < 1:
        raise RecipeError(f"--layers: wanted 1 or more, got {layers}")
    sizes = SHAPES[shape]
    if layers is not None:
        sizes = dataclasses.replace(sizes, num_hidden_layers=layers)
    write_random_checkpoint(directory, sizes, dtype=dtype, progress=Bars())


@bench.command("convert")
def convert(
    model: Annotated[Path, typer.Option(help="Model directory to convert.")],
    trials: Annotated[int, typer.Option(help="Counted rounds, after one that is not.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file.")
    ] = None,
) -> None:
    """Time our conversions and mlx_lm.convert's, in turns, and both ways to cluster."""
    if trials < 1:
        raise RecipeError(f"--trials: wanted 1 or more, got {trials}")
    start(None)
    from rich.console import Console
    from rich.table import Table

    from splitquant_mlx.bench import bench_convert, bench_kmeans
    from splitquant_mlx.cli.console import Bars, plain, size
    from splitquant_mlx.directory import as_directory
    from splitquant_mlx.source import resolve

    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as scratch:
        with as_directory(resolve(str(model)), Bars(), scratch=Path(scratch)) as directory:
            found = bench_convert(directory, Path(scratch), trials=trials, progress=Bars())
    found["kmeans"] = bench_kmeans()
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    table = Table(box=None, padding=(0, 2, 0, 0), title=plain(str(model)), title_justify="left")
    table.add_column("program", no_wrap=True)
    for name in ("median", "slowest", "ratio", "peak memory"):
        table.add_column(name, justify="right")
    for name, program in found["programs"].items():
        table.add_row(
            name,
            f"{program['median_s']:.1f} s",
            f"{max(program['seconds']):.1f} s",
            f"{program['ratio']:.2f}",
            size(program["peak_bytes"]),
        )
    console = Console(highlight=False)
    console.print(table)
    kmeans = found["kmeans"]
    console.print(
        f"k-means, exact: {kmeans['exact_ns_per_weight']:.1f} ns a weight; scikit-learn's: "
        f"{kmeans['sklearn_ns_per_weight']:.0f} ns, {kmeans['ratio']:.0f} times as much"
    )
