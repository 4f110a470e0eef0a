"""The command `report`."""

from pathlib import Path
from typing import Annotated

import typer

from splitquant_mlx.cli import console
from splitquant_mlx.cli.options import JsonFile


def report(
    directory: Annotated[Path, typer.Argument(help="Directory of a study's results.")],
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Page to write; default: DIRECTORY/report.html.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write the tables to this file as Markdown.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Print a study's results as tables, and write tables and plots to an HTML page."""
    from splitquant_mlx.report import html, load_report, markdown, terminal, values

    loaded = load_report(directory)
    if markdown_file is not None:
        _write(markdown_file, markdown(loaded))
    page = html_file or directory / "report.html"
    _write(page, html(loaded))
    if console.write_json(json_file, values(loaded)):
        return
    for table in terminal(loaded):
        console.show("", table)
    console.show("", f"Saved {console.plain(str(page))}")


def _write(file: Path, text: str) -> None:
    from splitquant_mlx.runtime.disk import as_target_error, write_atomic

    with as_target_error(file):
        if file.exists() and not file.is_file():  # such as /dev/stdout
            file.write_text(text, encoding="utf-8")
        else:
            write_atomic(file.resolve(), text.encode())
