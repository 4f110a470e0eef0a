"""Render a report as Markdown and for the terminal."""

import re
from typing import TYPE_CHECKING

from splitquant_mlx.report.finding import claims, finding
from splitquant_mlx.report.grids import Grid, grids
from splitquant_mlx.report.rows import Report

if TYPE_CHECKING:
    from rich.table import Table


def all_grids(report: Report) -> list[Grid]:
    """Return the report's tables, and the paper's claims where the study names a paper."""
    found = grids(report)
    if report.study.paper:
        source = report.study.paper.source
        claimed = Grid(
            title=f"What the paper states ({source})",
            headers=("claim", "the paper's figure", "measured here"),
            rows=claims(report),
            note=f"The figures in the second column are those of {source}, not ours.",
            of_the_paper=True,
        )
        found.append(claimed)
    return found


def markdown(report: Report) -> str:
    """Return the finding, the tables and the notes as Markdown; names in it are escaped."""
    told = finding(report)
    lines = [f"# {_escaped(report.study.title)}", "", f"Model: {_escaped(report.study.model)}", ""]
    lines += [_escaped(told.headline), ""]
    lines += [f"- {_escaped(text)}" for text in told.details]
    for grid in all_grids(report):
        lines += ["", f"## {_escaped(grid.title)}", ""]
        lines.append(_line(grid.headers))
        rule = "---|" if grid.of_the_paper else "---:|"
        lines.append("|---|" + rule * (len(grid.headers) - 1))
        lines += [_line(row) for row in grid.rows]
        lines += ["", _escaped(grid.note)] if grid.note else []
    if report.study.notes:
        lines += ["", "## Notes", "", *(f"- {_escaped(note)}" for note in report.study.notes)]
    return "\n".join(lines) + "\n"


def terminal(report: Report) -> "list[Table]":
    """Return one rich table for each grid; nothing in the results is taken for markup."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    for grid in all_grids(report):
        table = Table(
            title=Text(_printable(grid.title), style="bold"),
            caption=Text(_printable(grid.note)),
            title_justify="left",
            caption_justify="left",
            box=None,
            padding=(0, 2, 0, 0),
        )
        for place, header in enumerate(grid.headers):
            text = place == 0 or grid.of_the_paper
            table.add_column(
                # headings break where they can, so that a narrow terminal has room for figures
                Text(header if text else re.sub(r" |(?<=/)", "\n", header)),
                justify="left" if text else "right",
                vertical="top",
                overflow="fold",
                no_wrap=not text,
                min_width=12 if text else None,
            )
        for row in grid.rows:
            table.add_row(*(Text(_printable(cell)) for cell in row))
        tables.append(table)
    return tables


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", _printable(text))


def _printable(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
