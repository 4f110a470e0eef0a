"""Define the options and the output that the benchmarks share."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitquant_mlx.errors import RecipeError, TargetError

if TYPE_CHECKING:
    from rich.table import Table

    from splitquant_mlx.bench.random_checkpoint import Shape

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]


def save_json(file: Path | None, found: dict[str, Any]) -> None:
    """Write the results, if a file was asked for. Raises TargetError."""
    if file is None:
        return
    try:
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as exc:
        raise TargetError(f"--json {file}: {exc.strerror or exc}") from exc


def check_json(file: Path | None) -> None:
    """Refuse, before the work, a file that cannot be written for want of its directory."""
    if file is not None and not file.parent.is_dir():
        raise TargetError(f"--json {file}: there is no directory {file.parent}: make it first")


def new_table(title: str, *columns: str) -> "Table":
    """Return an empty table: a first column of names, then figures."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    table.add_column(no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def named_shape(shape: str) -> "Shape":
    """Return a well-known shape. Raises RecipeError for a name that is none."""
    from splitquant_mlx.bench.random_checkpoint import SHAPES

    if shape not in SHAPES:
        raise RecipeError(f"shape: wanted one of {', '.join(SHAPES)}, got {shape!r}")
    return SHAPES[shape]
