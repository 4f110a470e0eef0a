"""The command `bench` and its subcommands."""

from pathlib import Path
from typing import Any

import typer

from splitquant_mlx.cli.bench.conversion import calibrated, convert, make_checkpoint
from splitquant_mlx.cli.bench.speed import speed, trial
from splitquant_mlx.cli.help import Command, Group
from splitquant_mlx.errors import closest_word


class Bench(Group):
    """A group of commands in which `bench MODEL` means `bench speed MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the command `speed` if none is given, unless one was misspelled."""
        name = args[0] if args else "help"
        known = (*self.commands, "help", "-h", "--help")
        is_model = name[:1] == "-" or Path(name).exists() or not closest_word(name, self.commands)
        if name not in known and is_model:
            args = ["speed", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(no_args_is_help=True)
bench.command("trial", cls=Command, hidden=True)(trial)
for name, command, example in (
    ("speed", speed, "my-model --against my-other-model"),
    ("convert", convert, "meta-llama/Llama-3.2-1B"),
    ("calibrated", calibrated, "my-original"),
    ("make-checkpoint", make_checkpoint, "llama-3.2-1b my-random-model"),
):
    epilog = f"Example: splitquant-mlx bench {name} {example}"
    bench.command(name, cls=Command, epilog=epilog)(command)
