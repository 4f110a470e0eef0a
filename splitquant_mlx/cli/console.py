"""Print results and notes: styled on a terminal, else plain lines, not wrapped or padded."""

import json
import os
import shlex
import sys
import unicodedata
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from splitquant_mlx.errors import TargetError, one_line
from splitquant_mlx.sizes import size as size  # for the other modules here

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_state = {"quiet": False}


def set_quiet(quiet: bool) -> None:
    """Drop, from here on, progress and notes."""
    _state["quiet"] = quiet


def is_quiet() -> bool:
    """Return whether progress and notes are dropped."""
    return _state["quiet"]


def stderr() -> "Console":
    """Return rich's console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, **styles())


def note(text: str) -> None:
    """Print a line that is no result, dim, on stderr."""
    if is_quiet():
        return
    sys.stdout.flush()  # to keep their order where both go to one place
    print_stderr(text, style="dim")


def print_stderr(text: str, style: str = "") -> None:
    """Print a line on stderr, broken between words on a terminal."""
    if sys.stderr.isatty():
        stderr().print(text, style=style)
    else:
        print(text, file=sys.stderr, flush=True)


def show(*items: Any) -> None:
    """Print strings and rich's tables on standard output; a terminal's lines end after a word."""
    from rich.console import Console

    if sys.stdout.isatty():
        console = Console(highlight=False, markup=False, emoji=False, **styles())
        for item in items:
            console.print(item)
        return
    for item in items:
        text = item
        if not isinstance(item, str):
            lines = StringIO()
            Console(file=lines, width=10_000, color_system=None, markup=False).print(item)
            text = "\n".join(line.rstrip() for line in lines.getvalue().splitlines())
        print(text)


def next_step(done: str, *command: object) -> None:
    """Print what was done, and on a line that can be copied the command that goes on from there."""
    show(done)
    print(f"Next: splitquant-mlx {shlex.join(map(str, command))}")


def new_table(title: str, *columns: str) -> "Table":
    """Return an empty table: a first column of names, then figures."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), title=title or None, title_justify="left")
    table.add_column(no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def pairs(*rows: tuple[str, str]) -> "Table":
    """Return a table of names and values."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def write_json(target: str | Path | None, value: Any) -> bool:
    """Write JSON to a file, or to standard output for "-"; return whether it was standard output.

    Raises:
        TargetError: when the file cannot be written.
    """
    if target is None:
        return False
    text = json.dumps(value, indent=2, allow_nan=False, default=str)
    if str(target) == "-":
        print(text)
        return True
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as exc:
        raise TargetError(f"--json {target}: {exc.strerror or exc}") from exc
    return False


def check_json(target: str | None) -> str | None:
    """Refuse, before the work, a file that cannot be written for want of its directory."""
    if target is not None and not (parent := Path(target).parent).is_dir():
        raise TargetError(f"--json {target}: there is no directory {parent}: make it first")
    return target


def plain(text: str, most: int = 1500) -> str:
    """Return the first `most` characters of `text` on one line; they cannot drive a terminal."""
    line = one_line(text)
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def printable(text: str) -> str:
    """Return `text` without control characters but newline and tab: it cannot drive a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


class Printable:
    """Write to another stream what is printable."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` without what could drive a terminal."""
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def styles() -> dict[str, Any]:
    """Return what rich's consoles take so that NO_COLOR drops every escape code."""
    return {"color_system": None} if os.environ.get("NO_COLOR") else {}
