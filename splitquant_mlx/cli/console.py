"""Draw progress bars and sizes; everything but results goes to stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Bars:
    """Show each task of a library call as a bar on stderr; see `splitquant_mlx.progress`."""

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
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
        quiet = not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=quiet) as bars:
            bar = bars.add_task(label, total=total)
            yield lambda amount: bars.advance(bar, amount)


def plain(text: str) -> str:
    """Return `text` on one line, without characters that could drive a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def size(nbytes: float) -> str:
    """Return a size in GB, MB or kB, powers of ten."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes / 1e3:.1f} kB"
