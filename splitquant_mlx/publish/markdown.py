"""Text of others in Markdown, where it stays text."""

from collections.abc import Iterable, Sequence

MOST = 160


def code(text: object) -> str:
    """Return `text` as a code span on one line, without what could end the span or a cell.

    In a code span nothing is a link, a heading or HTML.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line.replace("`", "'").replace("|", "\N{BROKEN BAR}")
    return f"`{line if len(line) <= MOST else line[: MOST - 4] + ' ...'}`" if line else "`?`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
