"""A report as Markdown and for the terminal; whatever stands in the results stays text."""

import re
from typing import TYPE_CHECKING

from splitquant_mlx.errors import one_line
from splitquant_mlx.report.rows import Report
from splitquant_mlx.report.tables import left_out, tables

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def markdown(report: Report) -> str:
    """Return the tables and the notes as Markdown; names in it are escaped."""
    lines = [f"# {_escaped(report.study.title)}", "", f"Model: {_escaped(report.study.model)}"]
    for table in tables(report):
        lines += ["", f"## {_escaped(table.title)}", "", _line(table.headers)]
        lines.append("|---|" + "---:|" * (len(table.headers) - 1))
        lines += [_line(row) for row in table.rows]
        lines += ["", _escaped(table.note)] if table.note else []
    if notes := notes_of(report):
        lines += ["", "## Notes", "", *(f"- {_escaped(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def notes_of(report: Report) -> list[str]:
    """Return the study's notes, and what was measured and is not shown."""
    return [*report.study.notes, *filter(None, [left_out(report)])]


def terminal(report: Report) -> "list[RichTable]":
    """Return one rich table per table; nothing in the results is taken for markup."""
    from rich.table import Table as RichTable
    from rich.text import Text

    found = []
    for table in tables(report):
        shown = RichTable(
            title=Text(one_line(table.title), style="bold"),
            caption=Text(one_line(table.note)),
            title_justify="left",
            caption_justify="left",
            box=None,
            padding=(0, 2, 0, 0),
        )
        for place, header in enumerate(table.headers):
            # headings break where they can, so that a narrow terminal has room for figures
            shown.add_column(
                Text(re.sub(r" |(?<=/)", "\n", header) if place else header),
                justify="right" if place else "left",
                vertical="top",
                overflow="fold",
                no_wrap=bool(place) and not table.is_published,
                min_width=None if place else 12,
            )
        for row in table.rows:
            shown.add_row(*(Text(one_line(cell)) for cell in row))
        found.append(shown)
    return found


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", one_line(text))
