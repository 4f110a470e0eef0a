"""Draw progress bars and sizes; everything but results goes to stderr."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from splitquant_mlx.progress import Advance, Silent


class Bars:
    """Show each task of a library call as a bar on stderr; see `splitquant_mlx.progress`."""

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Advance]:
        """Show a bar for `total` steps, or a pulse where the total is unknown."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True)
        if not console.is_terminal:  # where rich ends its bars with an empty line
            with Silent().task(label, total) as advance:
                yield advance
            return
        with Progress(*columns, console=console, transient=True) as bars:
            bar = bars.add_task(label, total=total)

            def advance(amount: float, note: str = "") -> None:
                bars.update(bar, advance=amount, description=f"{label} {note}".rstrip())

            yield advance


def plain(text: str, most: int = 1500) -> str:
    """Return the first `most` characters of `text` on one line; they cannot drive a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
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


def size(nbytes: float) -> str:
    """Return a size in GB, MB or kB, powers of ten."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes / 1e3:.1f} kB"
