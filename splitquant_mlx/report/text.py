"""A report as Markdown and as tables for the terminal; all text is escaped."""

import re
from typing import TYPE_CHECKING

from splitquant_mlx.errors import one_line
from splitquant_mlx.report.rows import Report
from splitquant_mlx.report.tables import omitted_note, tables

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def markdown(report: Report) -> str:
    """Return the tables and notes as Markdown."""
    lines = [f"# {_escaped(report.study.title)}", "", f"Model: {_escaped(report.study.model)}"]
    for table in tables(report):
        lines += ["", f"## {_escaped(table.title)}", "", _line(table.headers)]
        lines.append("|---|" + "---:|" * (len(table.headers) - 1))
        lines += [_line(row) for row in table.rows]
        lines += ["", _escaped(table.note)] if table.note else []
    if notes := all_notes(report):
        lines += ["", "## Notes", "", *(f"- {_escaped(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def all_notes(report: Report) -> list[str]:
    """Return the study's notes and the note on omitted columns."""
    return [*report.study.notes, *filter(None, [omitted_note(report)])]


def terminal(report: Report) -> "list[RichTable]":
    """Return the tables as rich tables; the results are not parsed as markup."""
    from rich.table import Table as RichTable
    from rich.text import Text

    rich_tables = []
    for table in tables(report):
        rich_table = RichTable(
            title=Text(one_line(table.title), style="bold"),
            caption=Text(one_line(table.note)),
            title_justify="left",
            caption_justify="left",
            box=None,
            padding=(0, 2, 0, 0),
        )
        for index, header in enumerate(table.headers):
            # break headings at every space and slash to leave room for numbers
            rich_table.add_column(
                Text(re.sub(r" |(?<=/)", "\n", header) if index else header),
                justify="right" if index else "left",
                vertical="top",
                overflow="fold",
                no_wrap=bool(index) and not table.is_published,
                min_width=None if index else 12,
            )
        for row in table.rows:
            rich_table.add_row(*(Text(one_line(cell)) for cell in row))
        rich_tables.append(rich_table)
    return rich_tables


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", one_line(text))
