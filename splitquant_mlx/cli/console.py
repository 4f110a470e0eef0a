"""Print results and notes: styled on a terminal, else as plain lines without wrapping."""

import json
import os
import shlex
import sys
import unicodedata
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from splitquant_mlx.errors import TargetError, one_line
from splitquant_mlx.sizes import size as size  # re-exported for the commands

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_state = {"quiet": False}


def set_quiet(quiet: bool) -> None:
    """Set whether progress and notes are dropped."""
    _state["quiet"] = quiet


def is_quiet() -> bool:
    """Return whether progress and notes are dropped."""
    return _state["quiet"]


def stderr() -> "Console":
    """Return a rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, **styles())


def note(text: str) -> None:
    """Print a note on stderr, in dim style."""
    if is_quiet():
        return
    sys.stdout.flush()  # preserve the order if both streams go to one file
    print_stderr(text, style="dim")


def print_stderr(text: str, style: str = "") -> None:
    """Print a line on stderr, wrapped between words on a terminal."""
    if sys.stderr.isatty():
        stderr().print(text, style=style)
    else:
        print(text, file=sys.stderr, flush=True)


def show(*items: Any) -> None:
    """Print strings and rich tables on standard output, wrapped between words on a terminal."""
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
    """Print what was done and, on a line to copy, the next command."""
    show(done)
    print(f"Next: splitquant-mlx {shlex.join(map(str, command))}")


def new_table(title: str, *columns: str) -> "Table":
    """Return an empty table: a first column of names, then right-aligned columns."""
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
    """Return `target`. Raises TargetError when its directory does not exist."""
    if target is not None and not (parent := Path(target).parent).is_dir():
        raise TargetError(f"--json {target}: there is no directory {parent}: create it first")
    return target


def plain(text: str, most: int = 1500) -> str:
    """Return the first `most` characters of `text` on one line, without control characters."""
    line = one_line(text)
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def printable(text: str) -> str:
    """Return `text` without control characters other than newline and tab."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


class Printable:
    """A stream that removes control characters before it writes to another stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` without control characters."""
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def styles() -> dict[str, Any]:
    """Return the arguments of a rich console that make it respect NO_COLOR."""
    return {"color_system": None} if os.environ.get("NO_COLOR") else {}
