"""Offer `bench` and its commands."""

import typer

from splitquant_mlx.cli.bench.conversion import convert, kmeans, make_checkpoint
from splitquant_mlx.cli.bench.scaling import cost, memory
from splitquant_mlx.cli.bench.speed import speed, trial

bench = typer.Typer()
bench.callback(invoke_without_command=True)(speed)
bench.command("trial", hidden=True)(trial)
bench.command("convert")(convert)
bench.command("kmeans")(kmeans)
bench.command("memory")(memory)
bench.command("cost")(cost)
bench.command("make-checkpoint")(make_checkpoint)
