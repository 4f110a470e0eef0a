"""Offer `bench` and its commands."""

from typing import Any

import typer

from splitquant_mlx.cli.bench.calibrated import calibrated
from splitquant_mlx.cli.bench.conversion import convert, kmeans, make_checkpoint
from splitquant_mlx.cli.bench.memory import memory
from splitquant_mlx.cli.bench.speed import speed, trial
from splitquant_mlx.cli.help import Command, Group


class Bench(Group):
    """The group in which `bench MODEL` is `bench speed MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put in the command that is left out."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["speed", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(no_args_is_help=True)
bench.command("speed", cls=Command)(speed)
bench.command("trial", cls=Command, hidden=True)(trial)
bench.command("convert", cls=Command)(convert)
bench.command("kmeans", cls=Command)(kmeans)
bench.command("memory", cls=Command)(memory)
bench.command("calibrated", cls=Command)(calibrated)
bench.command("make-checkpoint", cls=Command)(make_checkpoint)
