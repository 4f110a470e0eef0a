"""Progress of library calls: bars on a terminal, else one line per stage and per minute."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from splitquant_mlx.cli import console
from splitquant_mlx.progress import Advance, Silent

INTERVAL_S = 60.0


class Bars:
    """A progress reporter that shows tasks on stderr; see `splitquant_mlx.progress`.

    Args:
        stages: labels of all tasks, to number them. Without a terminal and without stages, a task
            is printed only after a minute.
    """

    def __init__(self, stages: Sequence[str] = ()) -> None:
        self._stages = list(dict.fromkeys(stages))

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Advance]:
        """Show a bar of `total` steps, or a pulsing bar if the total is unknown."""
        if label in self._stages:
            label = f"{self._stages.index(label) + 1} of {len(self._stages)}, {label}"
        if console.is_quiet():
            task = Silent().task(label, total)
        elif sys.stderr.isatty():
            task = _bar(label, total)
        else:
            task = _lines(label, total, print_start=bool(self._stages))
        with task as advance:
            yield advance

    def note(self, text: str) -> None:
        """Show a line."""
        console.note(text)


@contextmanager
def _bar(label: str, total: float | None) -> Iterator[Advance]:
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    column = partial(Column, no_wrap=True)  # so that only the bar shrinks

    class Times(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(_times(task.elapsed or 0.0, task.completed, task.total))

    name = TextColumn("{task.description}", table_column=column())
    share = TextColumn("{task.percentage:>3.0f}%", table_column=column())
    columns = (name, BarColumn(bar_width=None), share, Times(table_column=column()))
    with Progress(*columns, console=console.stderr(), transient=True, expand=True) as bars:
        bar = bars.add_task(label, total=total)

        def advance(amount: float, note: str = "") -> None:
            bars.update(bar, advance=amount, description=f"{label} {note}".rstrip())

        yield advance


@contextmanager
def _lines(label: str, total: float | None, *, print_start: bool) -> Iterator[Advance]:
    started, done = time.monotonic(), 0.0
    stopped = threading.Event()

    def advance(amount: float, note: str = "") -> None:
        nonlocal done
        done += amount

    def tick() -> None:
        while not stopped.wait(INTERVAL_S):
            share = f"{done / total:.0%}, " if total else ""
            print(
                f"{label}: {share}{_times(time.monotonic() - started, done, total)}",
                file=sys.stderr,
                flush=True,
            )

    if print_start:
        print(label, file=sys.stderr, flush=True)
    threading.Thread(target=tick, daemon=True).start()
    try:
        yield advance
    finally:
        stopped.set()


def _times(elapsed_s: float, done: float, total: float | None) -> str:
    """Return the elapsed time and, once it can be estimated, the remaining time."""
    text = f"{clock(elapsed_s)} elapsed"
    if total and 0 < done < total and elapsed_s >= 1:
        text += f", {clock(elapsed_s * (total - done) / done)} left"
    return text


def clock(seconds: float) -> str:
    """Return a time as m:ss, or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
