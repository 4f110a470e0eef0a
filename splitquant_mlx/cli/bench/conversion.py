"""Benchmarks of conversions, and random checkpoints for them."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from splitquant_mlx.cli.console import new_table, plain, show, size, write_json
from splitquant_mlx.cli.options import (
    Device,
    JsonFile,
    ModelOption,
    Original,
    named_original,
    start,
)
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.recipe import DType, Recipe, load_recipe


def make_checkpoint(
    shape: Annotated[
        str,
        typer.Argument(
            help="tiny, deep, llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b, "
            "qwen3-30b-a3b."
        ),
    ],
    directory: Annotated[Path, typer.Argument(help="Directory to write.")],
    layers: Annotated[int | None, typer.Option(help="Number of layers, if not of SHAPE.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Hidden size, if not of SHAPE.")] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Intermediate size of the MLPs, if not of SHAPE.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="float16, bfloat16 or float32.")] = "bfloat16",
    shard_size: Annotated[float, typer.Option(min=0.001, help="Maximum file size, MB.")] = 5000,
) -> None:
    """Write a checkpoint with the shapes of a known model and random weights."""
    start(None)
    from splitquant_mlx.bench.random_checkpoint import SHAPES, write_random_checkpoint
    from splitquant_mlx.cli.progress import Bars

    if shape not in SHAPES:
        raise RecipeError(f"expected one of {', '.join(SHAPES)}, got {shape!r}", field="shape")
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    chosen = dataclasses.replace(SHAPES[shape], **given)
    max_shard_bytes = int(shard_size * 1e6)
    write_random_checkpoint(
        directory, chosen, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=Bars()
    )


def convert(
    model: Original = None,
    model_option: ModelOption = None,
    trials: Annotated[int, typer.Option(min=1, help="Measured rounds, after a warm-up.")] = 3,
    sklearn: Annotated[
        bool,
        typer.Option("--sklearn", help="Also time scikit-learn's k-means: 0.5 s/million weights."),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Time conversions by splitquant-mlx and by mlx_lm.convert, alternating."""
    name = named_original(model, model_option)
    start(None)

    from splitquant_mlx.bench.conversion import bench_convert
    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.models.directory import as_directory
    from splitquant_mlx.models.source import resolve

    with (
        tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as scratch,
        as_directory(resolve(name), Bars(), scratch=Path(scratch)) as directory,
    ):
        result = bench_convert(
            directory, Path(scratch), trials=trials, sklearn=sklearn, progress=Bars()
        )
    if write_json(json_file, result):
        return
    table = new_table(plain(name), "median", "slowest", "ratio", "peak memory")
    for name, program in result["programs"].items():
        table.add_row(
            name,
            f"{program['median_s']:.1f} s",
            f"{max(program['seconds']):.1f} s",
            f"{program['ratio']:.2f}",
            size(program["peak_bytes"]),
        )
    show(table)
    for name, program in result["programs"].items():
        if "stages_s" in program:
            stages = (f"{stage} {s:.2f}" for stage, s in program["stages_s"].items())
            show(f"seconds of {name}: {', '.join(stages)}")


def calibrated(
    model: Original = None,
    model_option: ModelOption = None,
    recipe: Annotated[Path | None, typer.Option(help="A calibrated recipe; default: gptq.")] = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Time a calibrated conversion relative to the matrix products that it needs."""
    name = named_original(model, model_option)
    chosen = load_recipe(recipe) if recipe else Recipe(method="gptq")
    start(device)

    from splitquant_mlx.bench.calibrated import bench_calibrated
    from splitquant_mlx.cli.progress import Bars

    result = bench_calibrated(Path(name), Path.cwd(), recipe=chosen, progress=Bars())
    if write_json(json_file, result):
        return
    table = new_table("stage", "time", "peak memory")
    for stage in result["stages"]:
        table.add_row(stage["stage"], f"{stage['seconds']:.1f} s", size(stage["peak_bytes"]))
    show(table)
    show(
        f"{result['wall_s']:.1f} s, {result['ratio']:.2f} times the bound of "
        f"{result['bound_s']:.1f} s at {result['product_rate'] / 1e9:.0f} GFLOP/s"
    )
