"""Offer `bench calibrated`."""

from pathlib import Path
from typing import Annotated

import typer

from splitquant_mlx.cli.console import check_json, new_table, show, size, write_json
from splitquant_mlx.cli.options import JsonFile, ModelOption, Original, one_original, start
from splitquant_mlx.recipe import Recipe, load_recipe


def calibrated(
    model: Original = None,
    model_option: ModelOption = None,
    recipe: Annotated[Path | None, typer.Option(help="A calibrated recipe; gptq without.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or gpu.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time a calibrated conversion against the products of matrices that it needs."""
    name = one_original(model, model_option)
    check_json(json_file)
    chosen = load_recipe(recipe) if recipe else Recipe(method="gptq")
    start(device)

    from splitquant_mlx.bench.calibrated import bench_calibrated
    from splitquant_mlx.cli.progress import Bars

    found = bench_calibrated(Path(name), Path.cwd(), recipe=chosen, progress=Bars())
    if write_json(json_file, found):
        return
    table = new_table("stage", "time", "peak memory")
    for stage in found["stages"]:
        table.add_row(stage["stage"], f"{stage['seconds']:.1f} s", size(stage["peak_bytes"]))
    show(table)
    show(
        f"{found['wall_s']:.1f} s, {found['ratio']:.2f} times the bound of "
        f"{found['bound_s']:.1f} s at {found['product_rate'] / 1e9:.0f} GFLOP/s"
    )
