"""Offer `verify`."""

from pathlib import Path
from typing import Annotated

import typer

from splitquant_mlx.cli.options import Device, Revision, start
from splitquant_mlx.errors import CheckpointError

MOST_PROBLEMS = 8


def verify(
    path: Annotated[Path, typer.Argument(help="Directory of a converted model.")],
    source: Annotated[
        str | None, typer.Option(help="The model it was made from, to compare every weight with.")
    ] = None,
    revision: Revision = None,
    device: Device = None,
) -> None:
    """Check a converted model: hashes, shapes, bits/weight, a forward pass, the original."""
    start(device)
    from rich.console import Console
    from rich.table import Table

    from splitquant_mlx.cli.console import plain
    from splitquant_mlx.cli.progress import Bars
    from splitquant_mlx.conversion.verify import verify as check
    from splitquant_mlx.models.source import resolve

    original = None if source is None else resolve(source, revision=revision)
    checks = check(path, source=original, progress=Bars())
    console = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for found in checks:
        verdict = "[red]FAILED[/]" if found.problems else "[green]ok[/]"
        table.add_row(found.name, plain(found.detail), verdict)
    console.print(table)
    problems = [problem for found in checks for problem in found.problems]
    for problem in problems[:MOST_PROBLEMS]:
        console.print(f"  {plain(problem, 300)}", markup=False, soft_wrap=True)
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{path} is not what its manifest says ({problems[0]:.300}{more}): convert it again"
        )
